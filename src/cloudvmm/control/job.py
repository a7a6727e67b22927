"""What is under way and what waits, as `vmm.jobs` tells it, and the way to call one off.

Every task of the runner and every outgoing migration has a ticket, whose number nothing else of this VMM ever
has. How far a job is, and whether it can end early, is known of undertakings alone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from cloudvmm.api import action
from cloudvmm.api.data import JobState, VmmJob, VmmJobs
from cloudvmm.api.error import JobCancelled, JobNotCancellable, NoSuchJob
from cloudvmm.control.holding import Holding

if TYPE_CHECKING:
    from cloudvmm.control.runner import Runner
    from cloudvmm.control.undertaking import Undertaking


class Ticket(msgspec.Struct):
    """`since` is UTC seconds, `since_s` the same moment by a clock that is never set."""

    id: int
    command: str
    state: JobState
    since: float
    since_s: float

    def begin(self) -> None:
        """It is its turn from now on."""
        self.state, self.since, self.since_s = JobState.RUNNING, time.time(), time.monotonic()


class Tickets:
    """Gives tickets, numbered from 1."""

    def __init__(self) -> None:
        self._last = 0

    def take(self, command: str) -> Ticket:
        self._last += 1
        return Ticket(self._last, command, JobState.QUEUED, time.time(), time.monotonic())


class Jobs:
    """Used by the control loop's thread alone."""

    def __init__(self, runner: Runner, holding: Holding) -> None:
        self._runner = runner
        self._holding = holding

    def list(self) -> VmmJobs:
        jobs = [self._running(ticket) for ticket in self._runner.under_way]
        jobs += [_job(task.ticket, can_cancel=task.request is not None) for task in self._runner.waiting]
        return VmmJobs(jobs=jobs)

    def cancel(self, job_id: int) -> None:
        """Call it off; it has not ended yet where it is under way.

        :raises NoSuchJob: it has ended, or there never was one.
        :raises JobNotCancellable: there is no way to do so, or it is too late; the cause tells more.
        """
        for task in self._runner.waiting:
            if task.ticket.id == job_id:
                if task.request is None:
                    raise JobNotCancellable(task.name)
                self._runner.call_off(task, JobCancelled())
                return
        for ticket in self._runner.under_way:
            if ticket.id == job_id:
                undertaking = self._undertaking(ticket)
                if undertaking is None:
                    raise JobNotCancellable(ticket.command)
                undertaking.cancel()
                return
        raise NoSuchJob(job_id)

    def _running(self, ticket: Ticket) -> VmmJob:
        undertaking = self._undertaking(ticket)
        if undertaking is None:
            return _job(ticket, can_cancel=False)
        return _job(
            ticket,
            can_cancel=undertaking.can_cancel,
            done_bytes=undertaking.done_bytes,
            total_bytes=undertaking.total_bytes,
        )

    def _undertaking(self, ticket: Ticket) -> Undertaking[Any] | None:
        """Return what the job of `ticket` is doing, if that can be told; not what one before it did."""
        match ticket.command:
            case action.VmSnapshot.name:
                found: Undertaking[Any] | None = self._holding.saving
            case action.VmSendMigration.name | action.VmReceiveMigration.name:
                found = self._holding.migration
            case _:
                found = None
        return None if found is None or found.is_over else found


def _job(
    ticket: Ticket, *, can_cancel: bool, done_bytes: int | None = None, total_bytes: int | None = None
) -> VmmJob:
    percent = None
    if done_bytes is not None and total_bytes:
        percent = round(min(100.0, 100 * done_bytes / total_bytes), 1)
    return VmmJob(
        id=ticket.id,
        command=ticket.command,
        state=ticket.state,
        since=round(ticket.since, 3),
        elapsed_ms=int((time.monotonic() - ticket.since_s) * 1000),
        can_cancel=can_cancel,
        done_bytes=done_bytes,
        total_bytes=total_bytes,
        percent=percent,
    )
