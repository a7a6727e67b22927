"""Which functions become spans. They are wrapped from outside: without a trace nothing is in their way.

A line names a function where it is looked up, which for one that is imported by its name is the module that
imports it. `install` wraps what is loaded by then, and may be called again when more is.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from cloudvmm.cli.trace.file import TraceFile
from cloudvmm.cli.trace.guest import GuestWatch

Name = str | Callable[..., str]
_MARK: Final = "__cloudvmm_traced__"


def _request_name(request: Any, *_: object) -> str:
    return f"{request.method} {request.path.rpartition('/')[2]}"


def _command_name(_evt: object, _sender: object, command: Any, *_: object) -> str:
    return str(command.name)


def _accepted_name(_loop: object, request: Any) -> str:
    return f"take {request.name}"


def _qmp_name(_client: object, command: str, *_: object, **__: object) -> str:
    return f"QMP {command}"


# Module, function, name of its spans.
TABLE: Final[tuple[tuple[str, str, Name], ...]] = (
    ("cloudvmm.http.connection", "answer", _request_name),
    ("cloudvmm.api.call", "send_request", _command_name),
    ("cloudvmm.control.loop", "ControlLoop._accept", _accepted_name),
    ("cloudvmm.control.blueprint", "check_config", "check the config"),
    ("cloudvmm.engine.qemu.engine", "learn_facts", "look at QEMU"),
    ("cloudvmm.engine.qemu.engine", "choose_accelerator", "choose the accelerator"),
    ("cloudvmm.engine.qemu.engine", "check_payload", "look at the kernel"),
    ("cloudvmm.engine.qemu.engine", "acquire", "open images, RAM and devices"),
    ("cloudvmm.engine.qemu.engine", "arguments", "write the command line"),
    ("cloudvmm.engine.qemu.engine", "launch", "start QEMU"),
    ("cloudvmm.engine.qemu.launch", "ChildProcess", "spawn"),
    ("cloudvmm.engine.qemu.qmp", "QmpClient.handshake", "QMP handshake"),
    ("cloudvmm.engine.qemu.qmp", "QmpClient.execute", _qmp_name),
)
# What is handed to the worker becomes a span there, called after what is done.
JOBS: Final = {
    "open_consoles": "open consoles",
    "build_vm": "build",
    "QemuMachine.boot": "boot",
    "QemuMachine.close": "end QEMU",
    "Consoles.renew_streams": "renew consoles",
    "deepcopy": "copy the config",
}


def install(trace: TraceFile) -> None:
    """Wrap everything in the table that is loaded and not wrapped yet."""
    for module_name, path, name in TABLE:
        _wrap(module_name, path, functools.partial(_spanning, trace, name=name))
    _wrap("cloudvmm.control.worker", "Worker.submit", lambda submit: _submitting(trace, submit))
    _wrap("cloudvmm.engine.qemu.engine", "QemuEngine.build", lambda build: _watching(trace, build))


def owner_of(module_name: str, path: str) -> tuple[Any, str]:
    """Return the module or class that holds the function at `path`, and its name there."""
    owner: Any = sys.modules[module_name]
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _wrap(module_name: str, path: str, make: Callable[[Any], Any]) -> None:
    if module_name not in sys.modules:
        return
    owner, name = owner_of(module_name, path)
    function = getattr(owner, name)
    if not hasattr(function, _MARK):
        wrapped = make(function)
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


def _spanning(trace: TraceFile, function: Any, *, name: Name) -> Any:
    @functools.wraps(function, updated=())
    def spanning(*args: Any, **options: Any) -> Any:
        begun_ns = time.monotonic_ns()
        error_name = None
        try:
            return function(*args, **options)
        except BaseException as error:
            error_name = type(error).__name__
            raise
        finally:
            ended_ns = time.monotonic_ns()
            text = name if isinstance(name, str) else name(*args, **options)
            trace.span(text, begun_ns, ended_ns, error=error_name)

    return spanning


def _submitting(trace: TraceFile, submit: Any) -> Any:
    @functools.wraps(submit)
    def submitting(worker: Any, job: Any) -> None:
        # A job of the cleaning kind has been told apart by now: what is left is to call it.
        submit(worker, _spanning(trace, job, name=job_name(job)))

    return submitting


def job_name(job: Any) -> str:
    """Return what a job of the worker is called in a trace."""
    while True:
        inner = getattr(job, "func", None) or getattr(job, "job", None)
        if inner is None:
            break
        job = inner
    name = getattr(job, "__qualname__", type(job).__name__)
    return JOBS.get(name, name)


def _watching(trace: TraceFile, build: Any) -> Any:
    """Have the guest of each machine watched from its boot on."""

    @functools.wraps(build)
    def watching(engine: Any, spec: Any) -> Any:
        machine = build(engine, spec)
        boot = machine.boot
        if spec.serial.path is not None:
            machine.boot = _then_watch(trace, boot, spec.serial.path)
        return machine

    return watching


def _then_watch(trace: TraceFile, boot: Any, path: str) -> Any:
    @functools.wraps(boot)
    def booting() -> None:
        watch = GuestWatch(trace, path)
        boot()
        watch.start()

    return booting
