"""The control loop: one thread that owns the VM, answers who reads it and orders who changes it.

It waits for: requests (the API eventfd), the exit eventfd (signals), outcomes of the worker and of the
reader, and events of the machine. It never waits for anything else: what takes time runs on the worker, one
command at a time in order of arrival, while reads are answered from what is committed.

`vmm.shutdown` and the exit eventfd overtake: the machine is killed, so that what is under way fails soon;
what is queued is refused; then the VM is deleted and the loop ends. Every request that was taken is answered.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from cloudvmm.api import action
from cloudvmm.api.channel import ApiReceiver
from cloudvmm.api.data import ApiResponsePayload, Empty, VmActionPayload, VmmPingResponse, VmState
from cloudvmm.api.error import ApiError, VmmShutdownError, VmmShuttingDown, VmNotRunning
from cloudvmm.control.command import Commands
from cloudvmm.control.descriptor import release
from cloudvmm.control.holding import Holding
from cloudvmm.control.journal import Journal
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Cleanup, Job, Outcome, Steps, Worker
from cloudvmm.engine import base
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.events.hub import EventHub
from cloudvmm.host.eventfd import EventFd

ABORT_RETRY_S = 0.1
READER_END_S = 2.0
WORKER_END_S = 10.0
LEAVE_S = 30.0

Log = Callable[[str, str], None]


class MachineExited(VmmError):
    """What ran the VM ended by itself; the text tells how."""


class StuckCommand(VmmError):
    def __init__(self, command: str) -> None:
        super().__init__(f"{command} did not end although it was told to")


class Running(msgspec.Struct):
    """The command under way: its steps, and the request that it answers, if somebody asked for it."""

    name: str
    steps: Steps
    request: action.ApiRequest | None
    error: type[ApiError]


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
    ) -> None:
        self.failure: VmmError | None = None
        self._engine = engine
        self._events = events
        self._receiver = receiver
        self._ping = ping
        self._journal = journal
        self._log = log
        self._no_shutdown = no_shutdown
        self._holding = Holding(self._watch, self._unwatch)
        self._commands = Commands(
            engine, events, self._holding, state_dir=journal.state_dir if journal else None
        )
        self._worker = Worker("vm-worker")
        self._reader = Worker("vm-reader")
        self._reads: deque[Callable[[Outcome], None]] = deque()
        self._queue: deque[Running] = deque()
        self._running: Running | None = None
        self._shutdown_requests: list[action.ApiRequest] = []
        self._is_leaving = False
        self._leave_until_s = 0.0
        self._has_left = False
        self._bars_wanted = False
        self._epoll = select.epoll()
        self._on_readable: dict[int, Callable[[], None]] = {}
        self._register(api_evt.fileno(), partial(self._on_requests, api_evt))
        self._register(exit_evt.fileno(), partial(self._on_exit, exit_evt))
        self._register(self._worker.done.fileno(), self._on_outcome)
        self._register(self._reader.done.fileno(), self._on_read)

    def run(self) -> None:
        """Serve until told to leave; on return every request has its answer and nothing is left behind."""
        try:
            while not self._has_left:
                timeout_s = ABORT_RETRY_S if self._is_leaving else None
                for fd, _ in self._epoll.poll(timeout_s):
                    handler = self._on_readable.get(fd)
                    if handler is not None:
                        handler()
                if self._is_leaving and not self._has_left:
                    self._abort_running()
        finally:
            self._end()

    # Requests

    def _on_requests(self, api_evt: EventFd) -> None:
        api_evt.read()
        while (request := self._receiver.take()) is not None:
            self._accept(request)

    def _accept(self, request: action.ApiRequest) -> None:
        if isinstance(request, action.VmmPing):
            request.reply.send(self._ping)
        elif isinstance(request, action.VmInfoRequest):
            self._answer_info(request)
        elif isinstance(request, action.VmCountersRequest):
            self._answer_counters(request)
        elif isinstance(request, action.VmmShutdown):
            self._shutdown_requests.append(request)
            self._leave()
        elif self._is_leaving:
            self._refuse(request)
        else:
            self._enqueue(request.name, self._commands.steps(request), request, request.error)

    def _answer_info(self, request: action.ApiRequest) -> None:
        try:
            request.reply.send(self._holding.info())
        except VmmError as error:
            request.reply.send(failed(request.error, error))
            return
        self._refresh_bars()

    def _answer_counters(self, request: action.ApiRequest) -> None:
        vm = self._holding.vm
        if vm is None:
            request.reply.send(failed(request.error, VmNotRunning()))
            return
        self._read(vm.machine.counters, partial(self._send_counters, request))

    def _send_counters(self, request: action.ApiRequest, outcome: Outcome) -> None:
        if outcome.error is not None:
            request.reply.send(failed(request.error, outcome.error))
        else:
            request.reply.send(VmActionPayload(msgspec.json.encode(outcome.value)))

    def _refuse(self, request: action.ApiRequest) -> None:
        release(request.data, self._holding.vm_config)
        request.reply.send(failed(request.error, VmmShuttingDown()))

    # Commands under way

    def _enqueue(
        self,
        name: str,
        steps: Steps,
        request: action.ApiRequest | None = None,
        error: type[ApiError] = VmmShutdownError,
    ) -> None:
        self._queue.append(Running(name, steps, request, error))
        if self._running is None:
            self._start_next()

    def _start_next(self) -> None:
        while self._running is None and self._queue:
            self._running = self._queue.popleft()
            self._note(partial(Journal.begin, command=self._running.name))
            self._advance(Outcome())

    def _on_outcome(self) -> None:
        self._worker.done.read()
        while (outcome := self._worker.take()) is not None:
            self._advance(outcome)
            self._start_next()

    def _advance(self, outcome: Outcome) -> None:
        """Take the command under way to its next job, or to its end."""
        running = self._running
        assert running is not None
        try:
            if outcome.error is not None:
                job = running.steps.throw(outcome.error)
            else:
                job = running.steps.send(outcome.value)
            while self._must_not_go_on(running, job):
                job = running.steps.throw(VmmShuttingDown())
        except StopIteration as end:
            self._finish(running, end.value, None)
        except Exception as error:
            self._finish(running, None, error)
        else:
            self._worker.submit(job)

    def _must_not_go_on(self, running: Running, job: Job) -> bool:
        is_overtaken = self._is_leaving and running.name != action.VmmShutdown.name
        return is_overtaken and not isinstance(job, Cleanup)

    def _finish(self, running: Running, payload: ApiResponsePayload | None, error: Exception | None) -> None:
        self._running = None
        self._note(partial(Journal.end, command=running.name, error=error))
        if error is not None:
            self._log("error", f"{running.name} failed: {': '.join(error_chain(error))}")
        if running.request is not None:
            release(running.request.data, self._holding.vm_config)
            running.request.reply.send(payload if payload is not None else failed(running.error, error))
        if running.name == action.VmmShutdown.name:
            self._finish_leaving(error)
        elif self._is_leaving:
            self._start_leaving()
        elif error is not None and running.request is None:
            self._fail(error)

    def _note(self, write: Callable[[Journal], None]) -> None:
        """Write to the journal, if there is one. A full disk costs the entry, not the VM."""
        if self._journal is None:
            return
        try:
            write(self._journal)
        except OSError as error:
            self._log("error", f"The journal cannot be written: {': '.join(error_chain(error))}")

    # The end

    def _on_exit(self, exit_evt: EventFd) -> None:
        exit_evt.read()
        self._leave()

    def _leave(self) -> None:
        """Overtake what is under way and queued, then delete the VM and end."""
        if self._is_leaving:
            return
        self._is_leaving = True
        self._leave_until_s = time.monotonic() + LEAVE_S
        while self._queue:
            waiting = self._queue.popleft()
            waiting.steps.close()
            if waiting.request is not None:
                self._refuse(waiting.request)
        if self._running is None:
            self._start_leaving()
        else:
            self._abort_running()

    def _abort_running(self) -> None:
        """Make what is under way fail soon; give up where even that has no effect."""
        if time.monotonic() > self._leave_until_s:
            self._finish_leaving(StuckCommand(self._running.name if self._running else "vmm.shutdown"))
            return
        if self._running is None or self._running.name == action.VmmShutdown.name:
            return
        vm = self._holding.vm
        if vm is not None:
            vm.machine.kill()
        else:
            self._engine.abort_build()

    def _start_leaving(self) -> None:
        self._enqueue(action.VmmShutdown.name, self._commands.vmm_shutdown())

    def _finish_leaving(self, error: Exception | None) -> None:
        for request in self._shutdown_requests:
            request.reply.send(Empty() if error is None else failed(request.error, error))
        if error is not None and self.failure is None:
            self._fail(error)
        self._has_left = True

    def _fail(self, error: Exception) -> None:
        """End the VMM because of `error`."""
        if self.failure is None:
            self.failure = error if isinstance(error, VmmError) else VmmError(repr(error))
        self._leave()

    def _end(self) -> None:
        self._has_left = True
        for request in self._receiver.close():
            self._refuse(request)
        if self._running is not None and self._running.request is not None:
            self._refuse(self._running.request)
        self._reader.stop(READER_END_S)
        self._on_read()
        self._worker.stop(WORKER_END_S)
        self._epoll.close()

    # Reading from the machine

    def _read(self, job: Callable[[], Any], then: Callable[[Outcome], None]) -> None:
        self._reads.append(then)
        self._reader.submit(job)

    def _on_read(self) -> None:
        if not self._has_left:
            self._reader.done.read()
        while (outcome := self._reader.take()) is not None:
            self._reads.popleft()(outcome)

    def _refresh_bars(self) -> None:
        vm = self._holding.vm
        if vm is None or self._bars_wanted or vm.state is VmState.CREATED:
            return
        self._bars_wanted = True
        self._read(vm.machine.pci_resources, partial(self._place_bars, vm))

    def _place_bars(self, vm: Vm, outcome: Outcome) -> None:
        self._bars_wanted = False
        if outcome.error is None and vm is self._holding.vm and self._holding.vm_config is not None:
            vm.place_bars(self._holding.vm_config, outcome.value)

    # Events of the machine

    def _watch(self, machine: base.Machine) -> None:
        self._register(machine.fileno(), partial(self._on_machine_event, machine))

    def _unwatch(self, machine: base.Machine) -> None:
        fd = machine.fileno()
        if self._on_readable.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _on_machine_event(self, machine: base.Machine) -> None:
        for event in machine.take_events():
            vm = self._holding.vm
            if vm is None or vm.machine is not machine:
                return
            self._handle(vm, event)

    def _handle(self, vm: Vm, event: base.EngineEvent) -> None:
        match event:
            case base.GuestPanicked(kind=kind):
                self._events.emit("guest", "panic", {"event": kind})
            case base.BalloonChanged(actual_bytes=actual_bytes):
                vm.balloon_actual_bytes = actual_bytes
            case base.PciChanged():
                self._refresh_bars()
            case base.ResetRequested():
                self._from_guest(vm, "guest reset", self._commands.reboot)
            case base.PoweredOff() if self._no_shutdown:
                self._from_guest(vm, "guest power-off", self._commands.shutdown)
            case base.PoweredOff():
                self._leave()
            case base.Exited(reason=reason):
                self._on_machine_exit(vm, reason)

    def _from_guest(self, vm: Vm, name: str, steps: Callable[[], Steps]) -> None:
        """Queue what the guest asked for; it is void if another command ends that VM first."""
        self._enqueue(name, self._while_current(vm, steps))

    def _while_current(self, vm: Vm, steps: Callable[[], Steps]) -> Steps:
        if vm is not self._holding.vm:
            return Empty()
        return (yield from steps())

    def _on_machine_exit(self, vm: Vm, reason: str) -> None:
        self._log("error", f"The VM is gone: {reason}")
        self._unwatch(vm.machine)
        vm.exit_reason = reason
        if vm.state is VmState.CREATED:
            return  # it never ran: vm.boot answers with the reason, and vm.shutdown clears up
        if self._no_shutdown:
            self._from_guest(vm, "machine exit", self._commands.shutdown)
        else:
            self._fail(MachineExited(f"The VM is gone: {reason}"))

    def _register(self, fd: int, handler: Callable[[], None]) -> None:
        self._on_readable[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)


def failed(kind: type[ApiError], cause: BaseException | None) -> ApiError:
    """Return the command's own error with `cause` behind it, ready to be sent."""
    error = kind()
    error.__cause__ = cause
    return error
