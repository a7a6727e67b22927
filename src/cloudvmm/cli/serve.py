"""Run one VMM in this process until it ends: the drop-in's life from its parsed flags to its exit status.

Reference: cli.md section 3, lifecycle.md section 17.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from functools import partial

from cloudvmm import api, cli, http
from cloudvmm.api.plumbing import VmmShuttingDown
from cloudvmm.control.vmm import VmmThread
from cloudvmm.daemon.brood import Brood
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.events.hub import EventHub
from cloudvmm.http.listener import Listener
from cloudvmm.http.server import serve_on, start_http_fd_thread, start_http_path_thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cloudvmm.config.operation import RestoreConfig
    from cloudvmm.config.vm import VmConfig
    from cloudvmm.control.runner import Log
    from cloudvmm.dbus import DbusServer
    from cloudvmm.engine.base import Engine
    from cloudvmm.events.hub import Event
    from cloudvmm.events.monitor import EventMonitor
    from cloudvmm.http.server import HttpServer

WARM_UP_AFTER_S = 0.05
DBUS_END_S = 1.0
HTTP_END_S = 1.0
_NO_VMM_THREAD = "Failed to start the VMM thread"


class DbusSettings:
    """Where D-Bus is served."""

    def __init__(self, service_name: str, object_path: str, *, system_bus: bool = False) -> None:
        self.service_name = service_name
        self.object_path = object_path
        self.system_bus = system_bus


class Settings:
    """What the flags ask for. File descriptors inside belong to the server from here on.

    `read_vm_config` gives the VM to boot, else `read_restore` what to restore. They are called when the API
    is there already, as in the reference, and raise VmmError. With `is_upgrade` the VM is the one of the VMM
    at `api_socket`, a path, whose place is taken. With `has_landlock` the threads that serve others are held
    to that; those of the VMM are by the VM's config. `on_ready` is called when the API is there.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        log: Log,
        api_socket: str | int | None = None,
        event_monitor: str | int | None = None,
        read_vm_config: Callable[[], VmConfig] | None = None,
        read_restore: Callable[[], RestoreConfig] | None = None,
        dbus: DbusSettings | None = None,
        state_dir: str | None = None,
        no_shutdown: bool = False,
        gdb_socket: str | None = None,
        max_connections: int = 10,
        peers: frozenset[int] | None = None,
        is_upgrade: bool = False,
        has_landlock: bool = False,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self.engine = engine
        self.log = log
        self.api_socket = api_socket
        self.event_monitor = event_monitor
        self.read_vm_config = read_vm_config
        self.read_restore = read_restore
        self.dbus = dbus
        self.state_dir = state_dir
        self.no_shutdown = no_shutdown
        self.gdb_socket = gdb_socket
        self.max_connections = max_connections
        self.peers = peers
        self.is_upgrade = is_upgrade
        self.has_landlock = has_landlock
        self.on_ready = on_ready


class ExitSignals:
    """SIGTERM and SIGINT, each of which `end` is told of; `came` tells whether one did.

    Python carries out a handler on the main thread and only once that wakes up; a signal that comes just
    before the main thread falls asleep in a lock would wait there for ever. The wakeup descriptor is written
    to at once, by whichever thread the signal hits, so a thread of its own reads that.
    """

    def __init__(self, end: Callable[[], None], log: Log) -> None:
        """To be made by the main thread. `end` must not block."""
        self.came = False
        self._end = end
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
            self._end()
            for number in numbers:
                self._log("info", f"Signal {signal.Signals(number).name} received")


def serve(settings: Settings) -> None:
    """Run until the VMM ends, by a command, a signal or a fault.

    :raises VmmError: the start failed, or the VMM ended because of a fault.
    """
    events = EventHub()
    events.subscribe(lambda event: settings.log("info", partial(_event_text, event)))
    monitor = _start_monitor(settings, events)
    debuggers = _listen_for_debuggers(settings)
    brood = Brood(
        settings.engine,
        no_shutdown=settings.no_shutdown,
        max_connections=settings.max_connections,
        peers=settings.peers,
        log=settings.log,
    )
    vmm = _start_vmm(settings, events, debuggers, brood)
    signals, listener = _take_hold(settings, vmm, brood)
    dbus: DbusServer | None = None
    server: HttpServer | None = None
    failure: VmmError | None = None
    try:
        if settings.is_upgrade:
            server = _take_over(settings, vmm, events)
        dbus = _start_dbus(settings, vmm, events)
        if server is None:
            server = _start_http(settings, vmm, events, listener)
            if settings.on_ready is not None:
                settings.on_ready()
            first_steps = _first_steps(settings, vmm)
            if not settings.has_landlock:  # else it was done when that could be
                warm_up(settings.engine, settings.log)
            first_steps()
    except VmmError as error:
        # What a signal or another client's vmm.shutdown overtook has not failed.
        failure = None if signals.came or _is_overtaken(error) else error
        vmm.exit_evt.write()
    vmm.join()
    if vmm.failure is not None and failure is None:
        failure = cli.error.ThreadExited()
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


def _hold_front_ends(settings: Settings) -> Listener | None:
    """Hold this thread, and those that it starts from here on, to what front ends need.

    What takes more is done before: return the API's socket, where it has a path. Whoever finds out about the
    engine is not among those threads, and ends when that is done.
    """
    from cloudvmm.control.landlock import hold_thread
    from cloudvmm.host.error import HostError

    warm_up(settings.engine, settings.log)
    load_commands()  # what they link to on the host may be out of reach afterwards
    path = settings.api_socket
    try:
        listener = Listener.at_path(path) if isinstance(path, str) else None
    except http.error.HttpServerError as error:
        raise cli.error.StartError(_NO_VMM_THREAD) from error
    try:
        hold_thread(each for each in (path, settings.gdb_socket) if isinstance(each, str))
    except HostError as error:
        if listener is not None:
            listener.close(remove_socket=True)
        raise cli.error.ApplyLandlockToThreads from error
    return listener


def _event_text(event: Event) -> str:
    from cloudvmm.events.monitor import log_text  # few logs want it

    return log_text(event)


def _is_overtaken(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, VmmShuttingDown):
        cause = cause.__cause__
    return cause is not None


def report(error: BaseException, program: str = "Cloud Hypervisor") -> None:
    """Print `error` and its causes on standard error as the reference does, then what is allowed instead."""
    from cloudvmm.options.error import hint_of

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
    from cloudvmm.events.monitor import EventMonitor

    try:
        monitor = EventMonitor(target) if isinstance(target, int) else EventMonitor.at_path(target)
    except OSError as error:
        raise cli.error.EventMonitorIo from error
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
        raise cli.error.StartError(_NO_VMM_THREAD) from error


def _take_hold(settings: Settings, vmm: VmmThread, brood: Brood) -> tuple[ExitSignals, Listener | None]:
    """Listen for signals; before that hold who serves others, and have its socket, where that is asked."""

    def end() -> None:
        vmm.exit_evt.write()
        brood.end()

    try:
        listener = _hold_front_ends(settings) if settings.has_landlock else None
        return ExitSignals(end, settings.log), listener
    except (OSError, RuntimeError, VmmError) as error:
        vmm.exit_evt.write()
        vmm.join()
        vmm.close()
        if isinstance(error, VmmError):
            raise
        raise cli.error.StartError("Failed to listen for signals") from error


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
        raise cli.error.StartError(_NO_VMM_THREAD) from error
    return server


def _take_over(settings: Settings, vmm: VmmThread, events: EventHub) -> HttpServer:
    """Have the VM of the VMM at the API socket, and its place there."""
    from cloudvmm.cli.upgrade import take_over

    warm_up(settings.engine, settings.log)
    path = settings.api_socket
    assert isinstance(path, str)
    options = _http_options(settings, events)
    server = start_http_path_thread(path, vmm.api_evt, vmm.api_sender, is_beside=True, **options)
    try:
        take_over(path, vmm, server, log=settings.log)
    except BaseException:
        server.close(remove_socket=True, deadline_s=HTTP_END_S)
        raise
    return server


def _start_http(
    settings: Settings, vmm: VmmThread, events: EventHub, listener: Listener | None
) -> HttpServer | None:
    options = _http_options(settings, events)
    try:
        if listener is not None:
            return serve_on(listener, vmm.api_evt, vmm.api_sender, **options)
        match settings.api_socket:
            case None:
                return None
            case int(fd):
                return start_http_fd_thread(fd, vmm.api_evt, vmm.api_sender, **options)
            case path:
                return start_http_path_thread(path, vmm.api_evt, vmm.api_sender, **options)
    except http.error.HttpServerError as error:
        raise cli.error.StartError(_NO_VMM_THREAD) from error


def _http_options(settings: Settings, events: EventHub) -> dict[str, Any]:
    return {
        "max_connections": settings.max_connections,
        "peers": settings.peers,
        "events": events,
        "log": settings.log,
    }


def load_commands() -> None:
    """Import what every command needs, and a start does without. Blocking."""
    from cloudvmm.api import public  # noqa: F401
    from cloudvmm.control import dispatch  # noqa: F401
    from cloudvmm.http import route, stream  # noqa: F401


def warm_up(engine: Engine, log: Log) -> None:
    """Find out about the engine, so that the first boot need not wait, and load the rest of the VMM.

    Garbage is collected from then on. A little later: whoever waits for the socket to be there asks first,
    and is answered first.
    """

    def find_out() -> None:
        time.sleep(WARM_UP_AFTER_S)
        try:
            load_commands()
            prepare()
            look()
            preload()
        except (OSError, ImportError):
            return  # no descriptor to read it with: who needs it meets the same, and answers with it
        finally:
            gc.freeze()  # what was loaded stays: nobody need ever look through it for garbage
            gc.enable()

    def prepare() -> None:
        from cloudvmm.api import COMMANDS, VmInfo
        from cloudvmm.config import form

        form.prepare([command.body for command in COMMANDS if command.body is not None], [VmInfo])

    def preload() -> None:
        from cloudvmm.cli import error, fatal  # noqa: F401
        from cloudvmm.control import latecomer
        from cloudvmm.options import error as of_options  # noqa: F401

        latecomer.preload()

    def look() -> None:
        from cloudvmm.engine.base import EngineError

        try:
            info = engine.info
        except EngineError:
            return  # vm.boot meets the same error and answers with it
        level = "warn" if info.accelerator == "tcg" else "info"
        log(
            level,
            f"{info.name} {info.version} runs the guest with {info.accelerator}: {info.accelerator_reason}",
        )

    threading.Thread(target=find_out, name="engine-info", daemon=True).start()


def _first_steps(settings: Settings, vmm: VmmThread) -> Callable[[], None]:
    """Read what the flags say of a VM; return what is left to do with it.

    A VM that goes on here from the last VMM on the state folder is the one that the flags asked for then. One
    that does not go on gives way.

    :raises VmmError: the flags cannot be read.
    """
    if vmm.has_adopted():
        return lambda: None
    if settings.read_vm_config is not None:
        return partial(_boot, vmm, settings.read_vm_config())
    if settings.read_restore is not None:
        return partial(_restore, vmm, settings.read_restore())
    return lambda: None


def _boot(vmm: VmmThread, vm_config: VmConfig) -> None:
    try:
        api.vm_delete(vmm.api_evt, vmm.api_sender)  # what the last VMM left, which runs no more
        api.vm_create(vmm.api_evt, vmm.api_sender, vm_config)
    except api.ApiError as error:
        raise cli.error.CreatingVm from error
    try:
        api.vm_boot(vmm.api_evt, vmm.api_sender)
    except api.ApiError as error:
        raise cli.error.BootingVm from error


def _restore(vmm: VmmThread, restore: RestoreConfig) -> None:
    try:
        api.vm_delete(vmm.api_evt, vmm.api_sender)
        api.vm_restore(vmm.api_evt, vmm.api_sender, restore)
    except api.ApiError as error:
        raise cli.error.RestoringVm from error
