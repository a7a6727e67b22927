"""Starting QEMU with its monitors, and reading its refusal.

Three QMP monitors over inherited socket pairs, so that no path exists in any file system: `control` for the
blocking calls of the worker, `reader` for queries beside them, `events` for the control loop. A QEMU whose
guest may run before its memory is there has another, `urgent`, whose commands do not wait for its main loop.

A QEMU that outlives us has our ends of them open, too, so that they stay connected, and whoever comes next
gets them from it, with all that was said meanwhile.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Mapping, Sequence

import msgspec

from cloudvmm.engine.base import DeviceError, EngineError, EngineTimeout, MachineGone, PayloadError, SlotError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.process import ChildProcess, ProcessSpec
from cloudvmm.engine.qemu.qmp import Observer, QmpClient, offer_handshake

# Threads with names: for people who look at them, and for ourselves to see when a dump's thread has ended.
_FIXED_ARGUMENTS = (
    *("-name", "debug-threads=on"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-no-shutdown", "-S"),
)
# No process of its own, no more rights, no other place in the scheduler, no system call that is out of use.
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_END_S = 1.0  # from the end of a monitor to its own
_MOST_FILES = 65536  # images, their chains, queues, regions of memory: of 254 vCPUs as well
_DEVICE_OPTIONS = ("-device ", "-blockdev ", "-netdev ", "-chardev ", "-object ", "-add-fd ", "-serial ")
_SANDBOX_WORDS = ("-sandbox ", "failed to install seccomp ")
_SLOT_WORDS = ("PCI: slot ", "PCI: no slot/function available")
# What QEMU's loaders say, in lower case.
_PAYLOAD_WORDS = (
    "could not open kernel file",
    "could not load kernel",
    "invalid kernel header",
    "invalid kernel_file_size",
    "error loading uncompressed kernel",
    "error while loading elf kernel",
    "cannot load x86-64 image",
    "kernel does not fit",
    "kernel too old",
    "error reading initrd",
    "initrd is too large",
    "could not load pc bios",
    "multiboot",
    "rom regions are overlapping",
)


class SandboxError(EngineError):
    """This QEMU, or the kernel, has no seccomp filter."""


class Monitors(msgspec.Struct, frozen=True):
    control: QmpClient
    reader: QmpClient
    events: QmpClient
    urgent: QmpClient | None = None

    def close(self) -> None:
        for client in (self.control, self.reader, self.events, self.urgent):
            if client is not None:
                client.close()


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`arguments` follow those that are the same for every machine; `fds` are lent, with `shown`.

    QEMU's own words are about files by other names where those are among `names`.

    With `has_sandbox` QEMU puts itself behind its seccomp filter before the guest runs, with `has_urgent` it
    has a monitor for urgent commands.
    `confine` and `group_fd` are `ProcessSpec`'s. With `state_dir` it outlives us.
    """

    arguments: Sequence[str]
    has_sandbox: bool
    has_urgent: bool = False
    confine: Callable[[], Sequence[str]] | None = None
    group_fd: int | None = None
    fds: Sequence[int] = ()
    shown: Mapping[int, int] = {}
    names: Mapping[str, str] = {}
    state_dir: str | None = None
    thp: bool = True
    timeout_s: float


def launch(
    spec: LaunchSpec,
    facts: QemuFacts,
    undo: contextlib.ExitStack,
    *,
    attempt: Attempt,
    observe: Observer | None = None,
) -> tuple[ChildProcess, Monitors]:
    """Blocking. Start QEMU with its vCPUs standing still and return once it answers on every monitor.

    `undo` ends what was started.

    :raises MachineGone: `attempt` was aborted, or QEMU let a monitor go and did not end.
    :raises EngineError: QEMU refused; the text is its own words. A `DeviceError`, `SlotError`,
        `PayloadError` or `SandboxError` where the words are about one.
    """
    attempt.check()
    names = ("control", "reader", "events", *(("urgent",) if spec.has_urgent else ()))
    clients: list[QmpClient] = []
    theirs: dict[str, int] = {}
    with contextlib.ExitStack() as lent:
        for name in names:
            near, far = socket.socketpair()
            lent.enter_context(far)
            client = QmpClient(near, observe=observe)
            undo.callback(client.close)
            offer_handshake(near, has_urgent=name == "urgent")
            clients.append(client)
            theirs[name] = far.fileno()
        sandbox = ("-sandbox", _SANDBOX) if spec.has_sandbox else ()
        argv = [facts.binary, *_FIXED_ARGUMENTS, *sandbox, *_monitor_arguments(theirs), *spec.arguments]
        process = ChildProcess(
            ProcessSpec(
                argv,
                fds=[*theirs.values(), *spec.fds, *_kept(spec, clients)],
                shown=spec.shown,
                state_dir=spec.state_dir,
                pid_file=None if spec.state_dir is None else pid_path(spec.state_dir),
                thp=spec.thp,
                confine=spec.confine,
                group_fd=spec.group_fd,
                most_files=_MOST_FILES,
            )
        )
        undo.callback(process.close)
    attempt.watch(process)
    try:
        for client in clients:
            client.handshake(timeout_s=spec.timeout_s)
    except MachineGone as gone:
        try:
            process.wait(timeout_s=_END_S)
        except EngineTimeout:
            raise gone from None  # it lives, and hears us no more
        finally:
            attempt.check()
        raise refusal(process, spec.names) from None
    attempt.check()
    return process, Monitors(*clients)


def pid_path(state_dir: str) -> str:
    """Return where the file is that says who the QEMU of the machine in `state_dir` is."""
    return f"{state_dir}/pid"


def _kept(spec: LaunchSpec, clients: Sequence[QmpClient]) -> list[int]:
    return [] if spec.state_dir is None else [client.fileno() for client in clients]


def refusal(process: ChildProcess, names: Mapping[str, str] | None = None) -> EngineError:
    """Return the error that says in QEMU's words why the `process`, which has ended, ended.

    Files are called by their `names` instead, where they have one.
    """
    words = process.complaint() or process.ending()
    for ours, name in (names or {}).items():
        words = re.sub(rf"{ours}(?!\d)", name.replace("\\", r"\\"), words)
    text = "\n".join(_without_json(line) for line in words.splitlines())
    if is_about_slot(words):
        return SlotError(text)
    if words.startswith(_DEVICE_OPTIONS):
        return DeviceError(text)
    if words.startswith(_SANDBOX_WORDS):
        return SandboxError(f"{text}; --seccomp false goes without the filter")
    if any(_is_about_payload(line) for line in words.splitlines()):
        return PayloadError(text)
    return EngineError(text)


def is_about_slot(words: str) -> bool:
    """Say whether QEMU's words are about a PCI slot that cannot be had."""
    return any(slot_words in words for slot_words in _SLOT_WORDS)


def _is_about_payload(line: str) -> bool:
    """Say whether a loader complains. A line about an option begins with it and may hold any text of ours."""
    return not line.startswith("-") and any(words in line.lower() for words in _PAYLOAD_WORDS)


def _without_json(line: str) -> str:
    """Return what is said of an option whose argument is JSON, without option and argument."""
    option, _, rest = line.partition(" ")
    if not option.startswith("-") or not rest.startswith("{"):
        return line
    import json  # rare, and msgspec does not say where an object ends

    try:
        _, end = json.JSONDecoder().raw_decode(rest)
    except ValueError:
        return line
    return rest[end:].removeprefix(": ") or line


def _monitor_arguments(fds: Mapping[str, int]) -> list[str]:
    arguments: list[str] = []
    for name, fd in fds.items():
        arguments += ["-chardev", f"socket,id=qmp.{name},fd={fd}"]
        # Not `-mon`, of which QEMU 11 says that it is deprecated: its own successor is none of QEMU 10's.
        arguments += ["-qmp", f"chardev:qmp.{name}"]
    return arguments
