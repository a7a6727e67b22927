"""Commands that change the VM, one at a time, in order of arrival; and the way to the end.

The runner drives the steps of a command: what a step does itself happens here, on the control loop's thread;
the jobs that it hands out are carried out by the worker. Leaving overtakes: what is under way is made to
fail soon, what is queued is refused, then the final task deletes the VM. Each task is ended exactly once, and
whoever asked for it is answered then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from cloudvmm.api import action
from cloudvmm.api.data import ApiResponsePayload, Empty
from cloudvmm.api.error import VmMigrating, VmmShutdownError, VmmShuttingDown
from cloudvmm.control.command import Commands
from cloudvmm.control.descriptor import release
from cloudvmm.control.failure import failed, foreseen, internal
from cloudvmm.control.holding import Holding
from cloudvmm.control.job import Ticket, Tickets
from cloudvmm.control.journal import Journal
from cloudvmm.control.lane import Lane, LaneEnd
from cloudvmm.control.ledger import Book
from cloudvmm.control.worker import Cleanup, Job, Outcome, Steps, Worker
from cloudvmm.engine.base import Engine
from cloudvmm.errors import VmmError, error_chain

if TYPE_CHECKING:
    from cloudvmm.api.channel import ApiResponse

LEAVE_S = 30.0
WORKER_END_S = 10.0
# What the journal calls that which goes on after vm.send-migration was answered.
MIGRATION = "outgoing migration"

# The text may be a function that makes it, which whoever drops the record never calls.
Log = Callable[[str, str | Callable[[], str]], None]


class StuckCommand(VmmError):
    def __init__(self, command: str) -> None:
        super().__init__(f"{command} did not end although it was told to")


class Task(msgspec.Struct):
    """Steps under way or waiting, and the request that they answer, if somebody asked."""

    name: str
    steps: Steps
    ticket: Ticket
    request: action.ApiRequest | None = None
    is_final: bool = False


class Runner:
    """Used by the control loop's thread alone. `on_finish` follows each command, before its answer."""

    def __init__(
        self,
        *,
        commands: Commands,
        holding: Holding,
        engine: Engine,
        journal: Journal | None,
        log: Log,
        lane: Lane,
        on_finish: Callable[[], None],
        book: Book | None = None,
    ) -> None:
        self.worker = Worker("vm-worker")
        self.is_leaving = False
        self.has_left = False
        self.failure: VmmError | None = None
        self._commands = commands
        self._holding = holding
        self._engine = engine
        self._journal = journal
        self._book = book
        self._log = log
        self._lane = lane
        self._on_finish = on_finish
        lane.on_begin = self._lane_began
        lane.on_end = self._lane_ended
        self.waiting: deque[Task] = deque()
        self._answers: list[tuple[action.ApiRequest, ApiResponse]] = []
        self._tickets = Tickets()
        self._lane_ticket: Ticket | None = None
        self._running: Task | None = None
        self._shutdown_requests: list[action.ApiRequest] = []
        self._final_error: Exception | None = None
        self._leave_until_s = 0.0

    def add_request(self, request: action.ApiRequest) -> None:
        """Queue what `request` asks for; refuse it while the VMM leaves."""
        if self.is_leaving:
            self._refuse(request)
        else:
            self._add(request.name, self._commands.steps(request), request)

    def add(self, name: str, steps: Steps) -> None:
        """Queue what nobody asked for but the guest; void while the VMM leaves."""
        if not self.is_leaving:
            self._add(name, steps)

    def add_shutdown(self, request: action.ApiRequest) -> None:
        """Leave, and answer `request` when that is done; at once where it is done already."""
        if self.has_left:
            self._answer_shutdown(request)
            return
        if self._holding.lent is not None and not self.is_leaving:
            # The reference refuses and ends all the same; here it ends in order.
            request.reply.send(failed(request.error, VmMigrating()))
        else:
            self._shutdown_requests.append(request)
        self.leave()

    def leave(self, failure: Exception | None = None) -> None:
        """Overtake what is under way and queued, delete the VM, end. `failure` is why, if not on request."""
        if failure is not None and self.failure is None:
            self.failure = failure if isinstance(failure, VmmError) else internal(failure)
        if self.is_leaving:
            return
        self.is_leaving = True
        self._leave_until_s = time.monotonic() + LEAVE_S
        while self.waiting:
            self._drop(self.waiting.popleft())
        self._lane.is_leaving = True
        if self._is_idle():
            self._add_final()
        else:
            self.abort()

    def abort(self) -> None:
        """Make what is under way fail soon; to be repeated. Gives up where it has no effect for long."""
        if time.monotonic() > self._leave_until_s:
            self._give_up()
            return
        if self._is_idle() or (self._running is not None and self._running.is_final):
            return
        if self._holding.cut is not None:
            self._holding.cut.now()
        if self._holding.vm is not None:
            self._holding.vm.machine.kill()
        else:
            self._engine.abort_build()

    @property
    def under_way(self) -> list[Ticket]:
        """What has begun and not ended, in the order in which it began."""
        running = None if self._running is None else self._running.ticket
        found = [ticket for ticket in (self._lane_ticket, running) if ticket is not None]
        return sorted(found, key=lambda ticket: ticket.id)

    def call_off(self, task: Task, error: VmmError) -> None:
        """Answer a task that waits with `error`, and forget it."""
        self.waiting.remove(task)
        self._drop(task, error)

    def take_outcomes(self) -> None:
        """Go on with what the worker has done."""
        self.worker.done.read()
        while (outcome := self.worker.take()) is not None:
            if self._running is not None:
                self._advance(self._running, outcome)
            self._start_next()

    def send_answers(self) -> None:
        """Answer whose commands have ended; to be done last.

        Whoever is answered wants the interpreter's lock at once, and waits twice as long where we go on.
        """
        if self._answers:
            answers, self._answers = self._answers, []
            for request, reply in answers:
                request.reply.send(reply)

    def end(self) -> None:
        """The loop is over, however it came to that: answer everybody, leave no guest behind."""
        self.has_left = self.is_leaving = True
        self.send_answers()
        if self._holding.cut is not None:
            self._holding.cut.now()
        if self._running is not None:
            self._drop(self._running)
        while self.waiting:
            self._drop(self.waiting.popleft())
        for request in self._shutdown_requests:
            self._answer_shutdown(request)
        self._shutdown_requests.clear()
        if self._holding.vm is not None:
            self._holding.vm.machine.kill()
            self.worker.submit(self._holding.vm.machine.close)
        if self._holding.consoles is not None:
            self.worker.submit(self._holding.consoles.close)
        self.worker.stop(WORKER_END_S)
        self._lane.end()

    def _is_idle(self) -> bool:
        return self._running is None and not self._lane.is_busy

    def _lane_began(self) -> None:
        self._lane_ticket = self._tickets.take(action.VmSendMigration.name)
        self._lane_ticket.begin()
        self._note(Journal.begin, MIGRATION)

    def _lane_ended(self, end: LaneEnd) -> None:
        """The VM is back, or gone for good: then the VMM is to leave."""
        self._lane_ticket = None
        self._note(Journal.end, MIGRATION, end.error)
        if self._book is not None:
            self._book.write()
        if self.is_leaving:
            if self._is_idle():
                self._add_final()
        elif end.is_to_leave:
            self.leave()
        for name, steps in end.postponed:
            self.add(name, steps())

    def _add(
        self, name: str, steps: Steps, request: action.ApiRequest | None = None, *, is_final: bool = False
    ) -> None:
        self.waiting.append(Task(name, steps, self._tickets.take(name), request, is_final))
        self._start_next()

    def _add_final(self) -> None:
        self._add(action.VmmShutdown.name, self._commands.vmm_shutdown(), is_final=True)

    def _start_next(self) -> None:
        while self._running is None and self.waiting:
            self._running = self.waiting.popleft()
            self._running.ticket.begin()
            self._note(Journal.begin, self._running.name)
            if self._book is not None:
                self._book.begin(self._running.name, self._running.request)
            self._advance(self._running, Outcome())

    def _advance(self, task: Task, outcome: Outcome) -> None:
        """Take `task` to its next job, or to its end."""
        try:
            if outcome.error is not None:
                job = task.steps.throw(outcome.error)
            else:
                job = task.steps.send(outcome.value)
            while self._must_not_go_on(task, job):
                job = task.steps.throw(VmmShuttingDown())
        except StopIteration as end:
            self._finish(task, end.value, None)
        except Exception as error:
            self._finish(task, None, error)
        else:
            self.worker.submit(job)

    def _must_not_go_on(self, task: Task, job: Job) -> bool:
        return self.is_leaving and not task.is_final and not isinstance(job, Cleanup)

    def _finish(self, task: Task, payload: ApiResponsePayload | None, error: Exception | None) -> None:
        self._running = None
        self._on_finish()
        if error is not None:
            error = foreseen(error)
            if self.is_leaving and not task.is_final:
                error = _overtaken(error)
        self._note(Journal.end, task.name, error)
        if self._book is not None:
            self._book.end()
        if task.request is not None:
            release(task.request.data, self._holding.vm_config)
            reply = payload if payload is not None else failed(task.request.error, error)
            self._answers.append((task.request, reply))
        if error is not None:
            self._log("error", f"{task.name} failed: {': '.join(error_chain(error))}")
        if task.is_final:
            self._leave_for_good(error)
        elif self.is_leaving:
            if self._is_idle():
                self._add_final()
        elif error is not None and task.request is None:
            self.leave(error)

    def _leave_for_good(self, error: Exception | None) -> None:
        self._final_error = error
        if error is not None and self.failure is None:
            self.failure = error if isinstance(error, VmmError) else internal(error)
        self.has_left = True
        for request in self._shutdown_requests:
            self._answer_shutdown(request)
        self._shutdown_requests.clear()

    def _give_up(self) -> None:
        if self._holding.vm is not None:
            self._holding.vm.machine.kill()
        self._leave_for_good(StuckCommand(self._running.name if self._running else action.VmmShutdown.name))

    def _answer_shutdown(self, request: action.ApiRequest) -> None:
        error = self._final_error
        request.reply.send(Empty() if error is None else failed(VmmShutdownError, error))

    def _drop(self, task: Task, error: VmmError | None = None) -> None:
        """End a task that is not carried out, or no further; `error` is why, if not that the VMM leaves."""
        if task is not self._running:
            task.steps.close()
        if task.request is not None:
            self._refuse(task.request, error)

    def _refuse(self, request: action.ApiRequest, error: VmmError | None = None) -> None:
        release(request.data, self._holding.vm_config)
        request.reply.send(failed(request.error, error or VmmShuttingDown()))

    def _note(self, write: Callable[..., None], *what: object) -> None:
        """Write to the journal, if there is one. A fault costs the entry, neither the VM nor an answer."""
        if self._journal is None:
            return
        try:
            write(self._journal, *what)
        except Exception as error:
            self._log("error", f"The journal cannot be written: {': '.join(error_chain(error))}")


def _overtaken(error: Exception) -> VmmShuttingDown:
    if isinstance(error, VmmShuttingDown):
        return error
    overtaken = VmmShuttingDown()
    overtaken.__cause__ = error
    return overtaken
