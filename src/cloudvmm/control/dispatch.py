"""Who answers which request, and what follows from what the machine says.

It is there from the first request on that is more than a ping, or from the end: what it needs is most of what
a VMM imports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cloudvmm.api import action
from cloudvmm.api.data import Empty, VmmPingResponse, VmState
from cloudvmm.api.error import NoMigration, NoSnapshot, VmError, VmmShuttingDown
from cloudvmm.api.ping import Ping, Pong
from cloudvmm.config import form
from cloudvmm.control.command import Commands
from cloudvmm.control.failure import failed
from cloudvmm.control.holding import GUEST_RESET, Holding
from cloudvmm.control.job import Jobs
from cloudvmm.control.journal import Journal
from cloudvmm.control.lane import Lane
from cloudvmm.control.ledger import Book, read_ledger
from cloudvmm.control.progress import BALLOON, RAM, VCPUS, Properties
from cloudvmm.control.ram import Vcpus
from cloudvmm.control.reader import Reader
from cloudvmm.control.runner import Log, Runner
from cloudvmm.control.sibling import Siblings
from cloudvmm.control.tree import bdf_of
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Steps
from cloudvmm.engine import base
from cloudvmm.errors import VmmError
from cloudvmm.events.hub import EventHub

if TYPE_CHECKING:
    from cloudvmm.control.undertaking import Undertaking


class MachineExited(VmmError):
    """What ran the VM ended by itself; the text tells how."""


class WrongData(VmError):
    def __init__(self, request: action.ApiRequest) -> None:
        wanted = "no data" if request.body is None else f"a {request.body.__name__}"
        super().__init__(f"{request.name} takes {wanted}, not a {type(request.data).__name__}")


class Dispatch:
    """Made and used by the control loop's thread alone.

    That calls what `listen` is given whenever a descriptor is readable, until `unlisten`.

    :raises OSError: the operating system gives no descriptor.
    :raises RuntimeError: it gives no thread.
    """

    def __init__(
        self,
        listen: Callable[[int, Callable[[], None]], None],
        unlisten: Callable[[int], None],
        *,
        engine: base.Engine,
        events: EventHub,
        ping: Pong,
        journal: Journal | None,
        log: Log,
        no_shutdown: bool,
        debugger_fd: int | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self._listen = listen
        self._unlisten = unlisten
        self._engine = engine
        self._journal = journal
        self._events = events
        self._ping: VmmPingResponse = form.decoder(VmmPingResponse).decode(ping.json)
        self._log = log
        self._no_shutdown = no_shutdown
        self._holding = Holding(self._watch, self._unwatch, debugger_fd=debugger_fd)
        self._watched: base.Machine | None = None
        self._lane = Lane(self._watch_lane, unlisten, log)
        state_dir = journal.state_dir if journal is not None else None
        self._commands = Commands(
            engine,
            events,
            self._holding,
            lane=self._lane,
            log=log,
            renew_workers=self._renew_workers,
            state_dir=state_dir,
            siblings=siblings,
        )
        self._book = None if state_dir is None else Book(state_dir, self._holding, log)
        if self._book is not None:
            self._holding.write_down = self._book.write
            # Where no machine outlives us, a fault costs the next VMM the config alone.
            self._holding.promise = self._book.promise if engine.outlives_manager else self._book.write
        self._runner = Runner(
            commands=self._commands,
            holding=self._holding,
            engine=engine,
            journal=journal,
            log=log,
            lane=self._lane,
            on_finish=self._on_finish,
            book=self._book,
        )
        try:
            self._reader = Reader(self._holding)
        except BaseException:
            self._runner.end()
            raise
        self._jobs = Jobs(self._runner, self._holding)
        # Who answers at once, or overtakes; all else waits for its turn.
        self._takers: dict[type[action.ApiRequest], Callable[[action.ApiRequest], None]] = {
            action.VmInfoRequest: self._answer_info,
            action.VmCountersRequest: self._reader.answer_counters,
            action.VmMigrationProgressRequest: self._answer_about_migration,
            action.VmCancelMigration: self._answer_about_migration,
            action.VmSnapshotProgressRequest: self._answer_about_snapshot,
            action.VmCancelSnapshot: self._answer_about_snapshot,
            action.VmmJobsRequest: self._answer_about_jobs,
            action.VmmCancelJob: self._answer_about_jobs,
            action.VmmShutdown: self._runner.add_shutdown,
        }
        listen(self._runner.worker.done.fileno(), self._on_outcome)
        listen(self._reader.worker.done.fileno(), self._reader.take_outcomes)

    @property
    def failure(self) -> VmmError | None:
        """Why the VMM ends, if not because it was asked to."""
        return self._runner.failure

    @property
    def is_leaving(self) -> bool:
        return self._runner.is_leaving

    @property
    def has_left(self) -> bool:
        return self._runner.has_left

    def _renew_workers(self) -> None:
        self._runner.worker.renew()
        self._reader.worker.renew()
        if self._holding.consoles is not None:
            self._holding.consoles.renew_thread()

    def adopt(self) -> bool:
        """Blocking. Go on where the last VMM on the state folder ended; return whether a machine goes on.

        To be done before anything else.

        :raises VmmError: there is a machine that cannot be taken over; it is left as it is.
        """
        if self._journal is None or self._book is None:
            return False
        from cloudvmm.control.adoption import Adoption

        journal, engine = self._journal, self._engine
        adoption = Adoption(
            engine,
            self._events,
            self._holding,
            self._commands,
            state_dir=journal.state_dir,
            add=self._runner.add,
            tell=journal.settle,
            log=self._log,
        )
        ledger = read_ledger(journal.state_dir)
        self._book.inherit(ledger)
        has_machine = adoption.run(ledger, journal.unfinished)
        self._hear_machine()
        if not self._runner.under_way:
            self._book.inherit(None)
        self._book.write()
        return has_machine

    def send_answers(self) -> None:
        """As `Runner.send_answers`, after each handler."""
        self._runner.send_answers()

    def leave(self) -> None:
        """End the VMM, whatever goes on; `has_left` tells when that is done."""
        self._runner.leave()

    def abort(self) -> None:
        """Make what is under way fail soon; to be repeated while the VMM leaves."""
        self._runner.abort()

    def fail(self, fault: Exception) -> None:
        """End the VMM because of a fault of our own."""
        self._log("error", f"The VMM failed inside: {fault!r}")
        self._runner.leave(fault)

    def end(self, left: Sequence[action.ApiRequest | Ping]) -> None:
        """The loop is over: answer everybody, those `left` in the channel too, and leave nothing behind."""
        for request in left:
            if isinstance(request, action.VmmShutdown):
                request.reply.send(Empty())
            else:
                request.reply.send(failed(request.error, VmmShuttingDown()))
        self._runner.end()
        self._reader.end()

    # Requests

    def accept(self, request: action.ApiRequest) -> None:
        """Answer `request`, now or once it is carried out.

        :raises Exception: a fault of our own; then it has no answer.
        """
        self._log_request(request)
        if isinstance(request, action.VmmPing):
            request.reply.send(self._ping)
        elif not isinstance(request.data, request.body or type(None)):
            request.reply.send(failed(request.error, WrongData(request)))
        else:
            self._takers.get(type(request), self._runner.add_request)(request)

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

    def _answer_about_migration(self, request: action.ApiRequest) -> None:
        self._answer_about(self._holding.migration or NoMigration(), request)

    def _answer_about_snapshot(self, request: action.ApiRequest) -> None:
        self._answer_about(self._holding.saving or NoSnapshot(), request)

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

    def _answer_about_jobs(self, request: action.ApiRequest) -> None:
        try:
            if isinstance(request, action.VmmJobsRequest):
                request.reply.send(self._jobs.list())
            else:
                self._jobs.cancel(request.data.id)
                request.reply.send(Empty())
        except VmmError as error:
            request.reply.send(failed(request.error, error))

    def _on_finish(self) -> None:
        self._report_drivers()
        self._reader.answer_postponed()

    def _on_outcome(self) -> None:
        self._hear_machine()
        vm = self._holding.vm
        state = vm.state if vm is not None else None
        self._runner.take_outcomes()
        vm = self._holding.vm
        if vm is not None and vm.state is not state:
            self._reader.look_at_bars()

    # Events of the machine

    def _watch(self, machine: base.Machine) -> None:
        self._watched = machine
        self._listen(machine.fileno(), partial(self._on_machine_event, machine))

    def _unwatch(self, machine: base.Machine) -> None:
        self._watched = None
        self._unlisten(machine.fileno())

    def _hear_machine(self) -> None:
        """Hear what the machine said before a job on it was done, before what comes of the job."""
        if self._watched is not None:
            try:
                self._on_machine_event(self._watched)
            except Exception as fault:
                self.fail(fault)

    def _on_machine_event(self, machine: base.Machine) -> None:
        for event in machine.take_events():
            vm = self._holding.vm
            if vm is None or vm.machine is not machine:
                return
            self._handle_event(vm, event)
        self._holding.write_down()

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

    def _watch_lane(self, fd: int, handler: Callable[[], None]) -> None:
        self._listen(fd, partial(self._on_lane, handler))

    def _on_lane(self, handler: Callable[[], None]) -> None:
        self._hear_machine()
        handler()


def _request_text(request: action.ApiRequest) -> str:
    name = type(request).__name__.removesuffix("Request")
    data = "" if request.data is None else f" {request.data!r}"
    return f"API request event: {name}{data}"
