"""The control loop: one thread that owns the VM, answers who reads it and orders who changes it.

It waits for: requests (the API eventfd), the exit eventfd (signals), outcomes of the worker and of the
reader, and events of the machine. It never waits for anything else: what takes time runs beside it
(`runner`, `reader`), while reads are answered from what is committed. A fault in its own code ends the VMM
in an orderly way; every request that was taken is answered whatever happens.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from cloudvmm.api import action
from cloudvmm.api.channel import ApiReceiver
from cloudvmm.api.data import Empty, VmmPingResponse, VmState
from cloudvmm.api.error import NoMigration, NoSnapshot, VmError, VmmShuttingDown
from cloudvmm.control.command import Commands
from cloudvmm.control.holding import GUEST_RESET, Holding
from cloudvmm.control.journal import Journal
from cloudvmm.control.lane import Lane
from cloudvmm.control.progress import BALLOON, RAM, VCPUS, Properties
from cloudvmm.control.ram import Vcpus
from cloudvmm.control.reader import Reader
from cloudvmm.control.runner import Log, Runner, failed
from cloudvmm.control.sibling import Siblings
from cloudvmm.control.tree import bdf_of
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Steps
from cloudvmm.engine import base
from cloudvmm.errors import VmmError
from cloudvmm.events.hub import EventHub
from cloudvmm.host.eventfd import EventFd

if TYPE_CHECKING:
    from cloudvmm.control.undertaking import Undertaking

ABORT_RETRY_S = 0.1


class MachineExited(VmmError):
    """What ran the VM ended by itself; the text tells how."""


class WrongData(VmError):
    def __init__(self, request: action.ApiRequest) -> None:
        wanted = "no data" if request.body is None else f"a {request.body.__name__}"
        super().__init__(f"{request.name} takes {wanted}, not a {type(request.data).__name__}")


class ControlLoop:
    """Made and run by one thread; `failure` is why it ended, if not because it was asked to."""

    def __init__(
        self,
        *,
        engine: base.Engine,
        events: EventHub,
        receiver: ApiReceiver,
        api_evt: EventFd,
        exit_evt: EventFd,
        ping: VmmPingResponse,
        journal: Journal | None,
        log: Log,
        no_shutdown: bool,
        debugger_fd: int | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self._events = events
        self._receiver = receiver
        self._ping = ping
        self._log = log
        self._no_shutdown = no_shutdown
        self._holding = Holding(self._watch, self._unwatch, debugger_fd=debugger_fd)
        self._watched: base.Machine | None = None
        self._lane = Lane(self._watch_lane, self._unregister, log)
        state_dir = journal.state_dir if journal is not None else None
        self._commands = Commands(
            engine, events, self._holding, lane=self._lane, log=log, state_dir=state_dir, siblings=siblings
        )
        with contextlib.ExitStack() as undo:
            self._epoll = select.epoll()
            undo.callback(self._epoll.close)
            self._runner = Runner(
                commands=self._commands,
                holding=self._holding,
                engine=engine,
                journal=journal,
                log=log,
                lane=self._lane,
                on_finish=self._report_drivers,
            )
            undo.callback(self._runner.end)
            self._reader = Reader(self._holding)
            undo.pop_all()
        self._on_readable: dict[int, Callable[[], None]] = {}
        self._register(api_evt.fileno(), partial(self._on_requests, api_evt))
        self._register(exit_evt.fileno(), partial(self._on_exit, exit_evt))
        self._register(self._runner.worker.done.fileno(), self._on_outcome)
        self._register(self._reader.worker.done.fileno(), self._reader.take_outcomes)

    @property
    def failure(self) -> VmmError | None:
        return self._runner.failure

    def run(self) -> None:
        """Serve until told to leave; on return every request has its answer and nothing is left behind."""
        try:
            while not self._runner.has_left:
                for fd, _ in self._epoll.poll(ABORT_RETRY_S if self._runner.is_leaving else None):
                    handler = self._on_readable.get(fd)
                    if handler is not None:
                        self._handle(handler)
                if self._runner.is_leaving and not self._runner.has_left:
                    self._runner.abort()
        finally:
            self._end()

    def _handle(self, handler: Callable[[], None]) -> None:
        try:
            handler()
        except Exception as fault:
            self._log("error", f"The VMM failed inside: {fault!r}")
            self._runner.leave(fault)

    def _end(self) -> None:
        for request in self._receiver.close():
            if isinstance(request, action.VmmShutdown):
                request.reply.send(Empty())
            else:
                request.reply.send(failed(request.error, VmmShuttingDown()))
        self._runner.end()
        self._reader.end()
        self._epoll.close()

    # Requests

    def _on_requests(self, api_evt: EventFd) -> None:
        api_evt.read()
        while (request := self._receiver.take()) is not None:
            try:
                self._accept(request)
            except Exception as fault:
                request.reply.send(failed(request.error, fault))
                raise

    def _accept(self, request: action.ApiRequest) -> None:
        self._log_request(request)
        if isinstance(request, action.VmmPing):
            request.reply.send(self._ping)
        elif not isinstance(request.data, request.body or type(None)):
            request.reply.send(failed(request.error, WrongData(request)))
        elif isinstance(request, action.VmInfoRequest):
            self._answer_info(request)
        elif isinstance(request, action.VmCountersRequest):
            self._reader.answer_counters(request)
        elif isinstance(request, action.VmMigrationProgressRequest | action.VmCancelMigration):
            self._answer_about(self._holding.migration or NoMigration(), request)
        elif isinstance(request, action.VmSnapshotProgressRequest | action.VmCancelSnapshot):
            self._answer_about(self._holding.saving or NoSnapshot(), request)
        elif isinstance(request, action.VmmShutdown):
            self._runner.add_shutdown(request)
        else:
            self._runner.add_request(request)

    def _log_request(self, request: action.ApiRequest) -> None:
        """Say in the reference's words what was asked for; whoever pings is heard on a finer level."""
        level = "debug" if isinstance(request, action.VmmPing) else "info"
        self._log(level, partial(_request_text, request))

    def _answer_info(self, request: action.ApiRequest) -> None:
        try:
            request.reply.send(self._holding.info())
        except VmmError as error:
            request.reply.send(failed(request.error, error))
        else:
            # The engine does not tell when the guest moves a BAR: whoever looks causes the next look.
            self._reader.look_at_bars()

    def _answer_about(self, what: Undertaking[Any] | VmmError, request: action.ApiRequest) -> None:
        """Answer at once, whatever goes on, who looks at it or calls it off."""
        try:
            if isinstance(what, VmmError):
                raise what
            if request.effect is action.Effect.READS:
                request.reply.send(what.progress())
            else:
                what.cancel()
                request.reply.send(Empty())
        except VmmError as error:
            request.reply.send(failed(request.error, error))

    def _on_outcome(self) -> None:
        self._hear_machine()
        vm = self._holding.vm
        state = vm.state if vm is not None else None
        self._runner.take_outcomes()
        vm = self._holding.vm
        if vm is not None and vm.state is not state:
            self._reader.look_at_bars()

    def _on_exit(self, exit_evt: EventFd) -> None:
        exit_evt.read()
        self._runner.leave()

    # Events of the machine

    def _watch(self, machine: base.Machine) -> None:
        self._watched = machine
        self._register(machine.fileno(), partial(self._on_machine_event, machine))

    def _unwatch(self, machine: base.Machine) -> None:
        self._watched = None
        self._unregister(machine.fileno())

    def _hear_machine(self) -> None:
        """Hear what the machine said before a job on it was done, before what comes of the job."""
        if self._watched is not None:
            self._handle(partial(self._on_machine_event, self._watched))

    def _on_machine_event(self, machine: base.Machine) -> None:
        for event in machine.take_events():
            vm = self._holding.vm
            if vm is None or vm.machine is not machine:
                return
            self._handle_event(vm, event)

    def _handle_event(self, vm: Vm, event: base.EngineEvent) -> None:
        match event:
            case base.GuestPanicked(kind=kind):
                self._events.emit("guest", "panic", {"event": kind})
            case base.BalloonChanged(actual_bytes=actual_bytes):
                vm.note_balloon(actual_bytes)
                self._tell_progress(vm.progress.follow(BALLOON, vm.guest_ram.balloon_bytes))
            case base.PciChanged():
                self._reader.look_at_bars()
            case base.MemoryPassSent(number=number):
                self._events.emit("vm", "migration-memory-iteration", {"id": str(number)})
            case base.ResetRequested():
                self._from_guest(vm, GUEST_RESET, self._commands.power.reboot)
            case base.PoweredOff() if self._no_shutdown:
                self._from_guest(vm, "guest power-off", self._commands.power.shutdown)
            case base.PoweredOff():
                self._runner.leave()
            case base.DebuggerStopped():
                self._on_debugger(vm, is_held=True)
            case base.DebuggerContinued():
                self._on_debugger(vm, is_held=False)
            case base.ZoneChanged(zone_id=zone_id, plugged_bytes=plugged_bytes):
                vm.note_zone(zone_id, plugged_bytes)
                self._tell_progress(vm.progress.follow(*vm.sized_by_zone(zone_id)))
            case base.ModuleTaken(number=number):
                vm.note_module(number)
                self._tell_progress(vm.progress.follow(RAM, vm.guest_ram_bytes))
            case base.VcpusChanged(vcpus=vcpus):
                vm.guest_vcpus = vcpus
                self._tell_progress(vm.progress.follow(VCPUS, vcpus))
            case base.VcpusRemoved(vcpus=vcpus):
                vm.vcpus = Vcpus(vcpus)
            case base.DeviceRemoved(device_id=device_id):
                self._on_device_removed(vm, device_id)
            case base.ResizeRefused(kind=kind):
                self._on_resize_refused(vm.progress.refuse(VCPUS if kind == "vcpus" else RAM))
            case base.VcpuStarted():
                self._tell_thread(event)
            case base.RemovalRefused(device_id=device_id):
                self._on_removal_refused(vm, device_id)
            case base.HelperEnded(device_id=device_id, reason=reason):
                self._log("warn", f"The program that serves the device {device_id} ended: {reason}")
                self._events.emit("vm", "device-helper-ended", {"id": device_id, "reason": reason})
            case base.DriverChanged() if vm.state is VmState.CREATED or vm.unreported:
                vm.unreported.append(event)
            case base.DriverChanged():
                self._tell_driver(event)
            case base.Exited(reason=reason):
                self._on_machine_exit(vm, reason)

    def _on_debugger(self, vm: Vm, *, is_held: bool) -> None:
        """A debugger has stopped the guest, or let it go on: as if that had been asked for here."""
        vm.is_held = is_held
        if is_held and vm.state is VmState.RUNNING:
            self._events.emit("vm", "pausing")
            vm.state = VmState.BREAK_POINT
            self._events.emit("vm", "paused")
        elif not is_held and vm.state in (VmState.BREAK_POINT, VmState.PAUSED):
            self._events.emit("vm", "resuming")
            vm.state = VmState.RUNNING
            self._events.emit("vm", "resumed")
        self._reader.look_at_bars()

    def _on_device_removed(self, vm: Vm, device_id: str) -> None:
        bdf = vm.drop_device(device_id)
        if bdf is not None:
            self._events.emit("vm", "device-removed", {"id": device_id, "bdf": bdf})

    def _on_removal_refused(self, vm: Vm, device_id: str) -> None:
        self._log("warn", f"The guest does not let go of the device {device_id}")
        slot = vm.numbering.slots.get(device_id)
        if slot is not None:
            self._events.emit("vm", "device-removal-refused", {"id": device_id, "bdf": bdf_of(slot)})

    def _tell_progress(self, properties: Properties | None) -> None:
        if properties is not None:
            self._events.emit("vm", "resize-progress", properties, is_ours=True)

    def _on_resize_refused(self, properties: Properties | None) -> None:
        if properties is not None:
            self._log("warn", f"The guest does not follow the resize of its {properties['part']}")
            self._events.emit("vm", "resize-refused", properties, is_ours=True)

    def _tell_thread(self, event: base.VcpuStarted) -> None:
        place = {"thread_id": str(event.thread_id), "process_id": str(event.process_id)}
        self._events.emit("vm", "vcpu-thread", {"id": str(event.vcpu), **place}, is_ours=True)

    def _report_drivers(self) -> None:
        """Tell what drivers did while their VM booted, behind the event that says that it has."""
        vm = self._holding.vm
        if vm is None or vm.state is VmState.CREATED:
            return
        unreported, vm.unreported = vm.unreported, []
        for event in unreported:
            self._tell_driver(event)

    def _tell_driver(self, event: base.DriverChanged) -> None:
        if event.is_active and event.kind is base.DriverKind.VHOST_USER:
            return  # as in the reference, which tells of its reset alone
        source = "vdpa" if event.kind is base.DriverKind.VDPA else "virtio-device"
        self._events.emit(source, "activated" if event.is_active else "reset", {"id": event.device_id})

    def _from_guest(self, vm: Vm, name: str, steps: Callable[[], Steps]) -> None:
        """Queue what the guest asked for; it is void if another command ends that VM first."""
        self._runner.add(name, self._while_current(vm, name, steps))

    def _while_current(self, vm: Vm, name: str, steps: Callable[[], Steps]) -> Steps:
        if vm is not self._holding.vm:
            return Empty()
        if self._holding.lent is not None and self._holding.cut is not None:
            # What the guest wants ends the migration; it is done once the VM is back.
            self._holding.lent.postponed.append((name, partial(self._while_current, vm, name, steps)))
            self._holding.cut.now()
            return Empty()
        return (yield from steps())

    def _on_machine_exit(self, vm: Vm, reason: str) -> None:
        self._log("error", f"The VM is gone: {reason}")
        self._unwatch(vm.machine)
        vm.exit_reason = reason
        if vm.state is VmState.CREATED:
            return  # it never ran: vm.boot answers with the reason, and vm.shutdown clears up
        if self._no_shutdown:
            self._from_guest(vm, "machine exit", self._commands.power.shutdown)
        else:
            self._runner.leave(MachineExited(f"The VM is gone: {reason}"))

    def _register(self, fd: int, handler: Callable[[], None]) -> None:
        self._on_readable[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _unregister(self, fd: int) -> None:
        if self._on_readable.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _watch_lane(self, fd: int, handler: Callable[[], None]) -> None:
        self._register(fd, partial(self._on_lane, handler))

    def _on_lane(self, handler: Callable[[], None]) -> None:
        self._hear_machine()
        handler()


def _request_text(request: action.ApiRequest) -> str:
    name = type(request).__name__.removesuffix("Request")
    data = "" if request.data is None else f" {request.data!r}"
    return f"API request event: {name}{data}"
