"""Run one VMM in this process until it ends: the drop-in's life from its parsed flags to its exit status.

Reference: cli.md section 3, lifecycle.md section 17.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from cloudvmm import api
from cloudvmm.config.operation import RestoreConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.latecomer import preload
from cloudvmm.control.runner import Log
from cloudvmm.control.vmm import VmmThread
from cloudvmm.daemon.brood import Brood
from cloudvmm.engine.base import Engine, EngineError
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.events.hub import EventHub
from cloudvmm.events.monitor import EventMonitor, log_text
from cloudvmm.host.eventfd import EventFd
from cloudvmm.http.server import HttpServer
from cloudvmm.options.error import hint_of

if TYPE_CHECKING:
    from cloudvmm.dbus import DbusServer

DBUS_END_S = 1.0
HTTP_END_S = 1.0


class StartError(VmmError):
    """Root of what ends a start; the texts are the reference's."""


class ThreadExited(VmmError):
    """VMM thread exited with error"""


class CreatingVm(StartError):
    """Error creating VM"""


class BootingVm(StartError):
    """Error booting VM"""


class RestoringVm(StartError):
    """Error restoring VM"""


class EventMonitorIo(StartError):
    """Error doing event monitor I/O"""


class DbusSettings(msgspec.Struct):
    """Where D-Bus is served."""

    service_name: str
    object_path: str
    system_bus: bool = False


class Settings(msgspec.Struct, kw_only=True):
    """What the flags ask for. File descriptors inside belong to the server from here on.

    `read_vm_config` gives the VM to boot, else `read_restore` what to restore. They are called when the API
    is there already, as in the reference, and raise VmmError. With `is_upgrade` the VM is the one of the VMM
    at `api_socket`, a path, whose place is taken.
    """

    engine: Engine
    log: Log
    api_socket: str | int | None = None
    event_monitor: str | int | None = None
    read_vm_config: Callable[[], VmConfig] | None = None
    read_restore: Callable[[], RestoreConfig] | None = None
    dbus: DbusSettings | None = None
    state_dir: str | None = None
    no_shutdown: bool = False
    gdb_socket: str | None = None
    max_connections: int = 10
    is_upgrade: bool = False


class ExitSignals:
    """SIGTERM and SIGINT, each of which rings `exit_evt` and ends `brood`; `came` tells whether one did.

    Python carries out a handler on the main thread and only once that wakes up; a signal that comes just
    before the main thread falls asleep in a lock would wait there for ever. The wakeup descriptor is written
    to at once, by whichever thread the signal hits, so a thread of its own reads that.
    """

    def __init__(self, exit_evt: EventFd, brood: Brood, log: Log) -> None:
        """To be made by the main thread."""
        self.came = False
        self._exit_evt = exit_evt
        self._brood = brood
        self._log = log
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write_fd, False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)

    def close(self) -> None:
        """Take no further notice of the two signals."""
        # Ignored from here on: the end is under way, and a second signal must not spoil its status.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(self._write_fd)
        self._thread.join()
        os.close(self._read_fd)

    def _run(self) -> None:
        while numbers := os.read(self._read_fd, 64):
            self.came = True
            self._exit_evt.write()
            self._brood.end()
            for number in numbers:
                self._log("info", f"Signal {signal.Signals(number).name} received")


def serve(settings: Settings) -> None:
    """Run until the VMM ends, by a command, a signal or a fault.

    :raises VmmError: the start failed, or the VMM ended because of a fault.
    """
    events = EventHub()
    events.subscribe(lambda event: settings.log("info", partial(log_text, event)))
    monitor = _start_monitor(settings, events)
    debuggers = _listen_for_debuggers(settings)
    brood = Brood(
        settings.engine,
        no_shutdown=settings.no_shutdown,
        max_connections=settings.max_connections,
        log=settings.log,
    )
    vmm = _start_vmm(settings, events, debuggers, brood)
    signals = _listen_for_signals(settings, vmm, brood)
    dbus: DbusServer | None = None
    server: HttpServer | None = None
    failure: VmmError | None = None
    try:
        if settings.is_upgrade:
            server = _take_over(settings, vmm, events)
        dbus = _start_dbus(settings, vmm, events)
        if server is None:
            server = _start_http(settings, vmm, events)
            first_steps = _first_steps(settings, vmm)
            _warm_up(settings)
            first_steps()
    except VmmError as error:
        # What a signal or another client's vmm.shutdown overtook has not failed.
        failure = None if signals.came or _is_overtaken(error) else error
        vmm.exit_evt.write()
    vmm.join()
    if vmm.failure is not None and failure is None:
        failure = ThreadExited()
        failure.__cause__ = vmm.failure
    if dbus is not None:
        dbus.close(deadline_s=DBUS_END_S)
    if server is not None:
        server.close(remove_socket=failure is None, deadline_s=HTTP_END_S)
    if failure is not None:
        brood.end()
    brood.wait()  # clones outlive the VM that they are of
    signals.close()
    vmm.close()
    if debuggers is not None:
        debuggers.close()
        with contextlib.suppress(OSError):
            os.unlink(settings.gdb_socket or "")
    if monitor is not None:
        monitor.close()
    if failure is not None:
        raise failure


def _is_overtaken(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, api.VmmShuttingDown):
        cause = cause.__cause__
    return cause is not None


def report(error: BaseException, program: str = "Cloud Hypervisor") -> None:
    """Print `error` and its causes on standard error as the reference does, then what is allowed instead."""
    chain = error_chain(error)
    if len(chain) == 1:
        text = f"Error: {program} exited with the following error:\n  {chain[0]}\n"
    else:
        lines = "".join(f"  {number}: {text}\n" for number, text in enumerate(chain))
        text = f"Error: {program} exited with the following chain of errors:\n{lines}"
    hint = hint_of(error)
    sys.stderr.write(text if hint is None else f"{text}\nAllowed: {hint}\n")


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


def _listen_for_debuggers(settings: Settings) -> socket.socket | None:
    """Return a socket that listens, None without one. As in the reference a failure is only logged."""
    if settings.gdb_socket is None:
        return None
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(settings.gdb_socket)
        listening.listen(1)
    except OSError as error:
        listening.close()
        settings.log("error", f"Failed to create a Unix domain socket listener: {error}")
        return None
    settings.log("info", f"Waiting for a GDB connection on {settings.gdb_socket}...")
    return listening


def _start_vmm(
    settings: Settings, events: EventHub, debuggers: socket.socket | None, brood: Brood
) -> VmmThread:
    try:
        return VmmThread(
            settings.engine,
            events=events,
            state_dir=settings.state_dir,
            no_shutdown=settings.no_shutdown,
            debugger_fd=None if debuggers is None else debuggers.fileno(),
            log=settings.log,
            siblings=brood,
        )
    except OSError as error:
        raise StartError("Failed to start the VMM thread") from error


def _listen_for_signals(settings: Settings, vmm: VmmThread, brood: Brood) -> ExitSignals:
    try:
        return ExitSignals(vmm.exit_evt, brood, settings.log)
    except (OSError, RuntimeError) as error:
        vmm.exit_evt.write()
        vmm.join()
        vmm.close()
        raise StartError("Failed to listen for signals") from error


def _start_dbus(settings: Settings, vmm: VmmThread, events: EventHub) -> DbusServer | None:
    wanted = settings.dbus
    if wanted is None:
        return None
    try:
        server: DbusServer = api.start_dbus_thread(
            wanted.service_name,
            wanted.object_path,
            vmm.api_evt,
            vmm.api_sender,
            system_bus=wanted.system_bus,
            events=events,
            log=settings.log,
        )
    except VmmError as error:
        if settings.is_upgrade:  # the VM is here, and would end with us
            settings.log("error", f"There is no D-Bus service: {', '.join(error_chain(error))}")
            return None
        raise StartError("Failed to start the VMM thread") from error
    return server


def _take_over(settings: Settings, vmm: VmmThread, events: EventHub) -> HttpServer:
    """Have the VM of the VMM at the API socket, and its place there."""
    from cloudvmm.cli.upgrade import take_over

    _warm_up(settings)
    path = settings.api_socket
    assert isinstance(path, str)
    options = {"max_connections": settings.max_connections, "events": events, "log": settings.log}
    server = api.start_http_path_thread(path, vmm.api_evt, vmm.api_sender, is_beside=True, **options)
    assert isinstance(server, HttpServer)
    try:
        take_over(path, vmm, server, log=settings.log)
    except BaseException:
        server.close(remove_socket=True, deadline_s=HTTP_END_S)
        raise
    return server


def _start_http(settings: Settings, vmm: VmmThread, events: EventHub) -> HttpServer | None:
    options = {"max_connections": settings.max_connections, "events": events, "log": settings.log}
    match settings.api_socket:
        case None:
            return None
        case int(fd):
            server = api.start_http_fd_thread(fd, vmm.api_evt, vmm.api_sender, **options)
        case path:
            server = api.start_http_path_thread(path, vmm.api_evt, vmm.api_sender, **options)
    assert isinstance(server, HttpServer)
    return server


def _warm_up(settings: Settings) -> None:
    """Find out about the engine, so that the first boot need not wait; then load the rest of the VMM."""

    def warm_up() -> None:
        look()
        preload()

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

    threading.Thread(target=warm_up, name="engine-info", daemon=True).start()


def _first_steps(settings: Settings, vmm: VmmThread) -> Callable[[], None]:
    """Read what the flags say of a VM; return what is left to do with it.

    :raises VmmError: the flags cannot be read.
    """
    if settings.read_vm_config is not None:
        return partial(_boot, vmm, settings.read_vm_config())
    if settings.read_restore is not None:
        return partial(_restore, vmm, settings.read_restore())
    return lambda: None


def _boot(vmm: VmmThread, vm_config: VmConfig) -> None:
    try:
        api.vm_create(vmm.api_evt, vmm.api_sender, vm_config)
    except api.ApiError as error:
        raise CreatingVm from error
    try:
        api.vm_boot(vmm.api_evt, vmm.api_sender)
    except api.ApiError as error:
        raise BootingVm from error


def _restore(vmm: VmmThread, restore: RestoreConfig) -> None:
    try:
        api.vm_restore(vmm.api_evt, vmm.api_sender, restore)
    except api.ApiError as error:
        raise RestoringVm from error
