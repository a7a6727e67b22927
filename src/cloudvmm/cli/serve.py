"""Run one VMM in this process until it ends: the drop-in's life from its parsed flags to its exit status.

Reference: cli.md section 3, lifecycle.md section 17.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import msgspec

from cloudvmm import api
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.vmm import VmmThread
from cloudvmm.engine.base import Engine, EngineError
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.events.hub import EventHub
from cloudvmm.events.monitor import EventMonitor
from cloudvmm.http.server import HttpServer

Log = Callable[[str, str], None]
HTTP_END_S = 2.0


class StartError(VmmError):
    """Root of what ends a start; the texts are the reference's."""


class ThreadExited(VmmError):
    """VMM thread exited with error"""


class CreatingVm(StartError):
    """Error creating VM"""


class BootingVm(StartError):
    """Error booting VM"""


class EventMonitorIo(StartError):
    """Error doing event monitor I/O"""


class Settings(msgspec.Struct, kw_only=True):
    """What the flags ask for. File descriptors inside belong to the server from here on."""

    engine: Engine
    log: Log
    api_socket: str | int | None = None
    event_monitor: str | int | None = None
    vm_config: VmConfig | None = None
    state_dir: str | None = None
    no_shutdown: bool = False
    max_connections: int = 10


def serve(settings: Settings) -> None:
    """Run until the VMM ends, by a command, a signal or a fault.

    :raises VmmError: the start failed, or the VMM ended because of a fault.
    """
    os.umask(0o077)
    events = EventHub()
    monitor = _start_monitor(settings, events)
    vmm = _start_vmm(settings, events)
    server: HttpServer | None = None
    failure: VmmError | None = None
    try:
        server = _start_http(settings, vmm)
        _warm_up(settings)
        if settings.vm_config is not None:
            _boot(vmm, settings.vm_config)
    except VmmError as error:
        failure = error
        vmm.exit_evt.write()
    vmm.join()
    if vmm.failure is not None and failure is None:
        failure = ThreadExited()
        failure.__cause__ = vmm.failure
    if server is not None:
        server.close(remove_socket=failure is None)
    vmm.close()
    if monitor is not None:
        monitor.close()
    if failure is not None:
        raise failure


def report(error: BaseException, program: str = "Cloud Hypervisor") -> None:
    """Print `error` and its causes on standard error as the reference does."""
    chain = error_chain(error)
    if len(chain) == 1:
        sys.stderr.write(f"Error: {program} exited with the following error:\n  {chain[0]}\n")
        return
    lines = "".join(f"  {number}: {text}\n" for number, text in enumerate(chain))
    sys.stderr.write(f"Error: {program} exited with the following chain of errors:\n{lines}")


def _start_monitor(settings: Settings, events: EventHub) -> EventMonitor | None:
    target = settings.event_monitor
    if target is None:
        events.emit("vmm", "starting")
        return None
    try:
        monitor = EventMonitor(target) if isinstance(target, int) else EventMonitor.at_path(target)
    except OSError as error:
        raise EventMonitorIo from error
    events.subscribe(monitor)
    events.emit("vmm", "starting")
    return monitor


def _start_vmm(settings: Settings, events: EventHub) -> VmmThread:
    try:
        vmm = VmmThread(
            settings.engine,
            events=events,
            state_dir=settings.state_dir,
            no_shutdown=settings.no_shutdown,
            log=settings.log,
        )
    except OSError as error:
        raise StartError("Failed to start the VMM thread") from error

    def leave(signal_number: int, _: FrameType | None) -> None:
        settings.log("info", f"Signal {signal.Signals(signal_number).name} received")
        vmm.exit_evt.write()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    return vmm


def _start_http(settings: Settings, vmm: VmmThread) -> HttpServer | None:
    match settings.api_socket:
        case None:
            return None
        case int(fd):
            server = api.start_http_fd_thread(
                fd, vmm.api_evt, vmm.api_sender, max_connections=settings.max_connections
            )
        case path:
            server = api.start_http_path_thread(
                path, vmm.api_evt, vmm.api_sender, max_connections=settings.max_connections
            )
    assert isinstance(server, HttpServer)
    return server


def _warm_up(settings: Settings) -> None:
    """Find out about the engine beside the start, so that the first boot need not wait for it."""

    def look() -> None:
        try:
            info = settings.engine.info
        except EngineError:
            return  # vm.boot meets the same error and answers with it
        level = "warn" if info.accelerator == "tcg" else "info"
        settings.log(
            level,
            f"{info.name} {info.version} runs the guest with {info.accelerator}: {info.accelerator_reason}",
        )

    threading.Thread(target=look, name="engine-info", daemon=True).start()


def _boot(vmm: VmmThread, vm_config: VmConfig) -> None:
    try:
        api.vm_create(vmm.api_evt, vmm.api_sender, vm_config)
    except api.ApiError as error:
        raise CreatingVm from error
    try:
        api.vm_boot(vmm.api_evt, vmm.api_sender)
    except api.ApiError as error:
        raise BootingVm from error
