"""Steps beside the queue of commands: an outgoing migration, which goes on while commands are answered.

As in `runner.py`, what a step does itself happens on the control loop's thread and its jobs run elsewhere,
here on a thread that is made for them. There is one such sequence at a time, because there is one VM to lend.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import msgspec

from cloudvmm.api.error import VmmShuttingDown
from cloudvmm.control.holding import Postponed
from cloudvmm.control.worker import Cleanup, Job, Outcome, Worker
from cloudvmm.errors import error_chain

END_S = 10.0


class LaneEnd(msgspec.Struct, frozen=True):
    """What is to follow: whether the VMM ends, and what waited for the VM to be back; and what went wrong."""

    is_to_leave: bool = False
    error: Exception | None = None
    postponed: Postponed = msgspec.field(default_factory=list)


LaneSteps = Generator[Job, Any, LaneEnd]


class Lane:
    """Used by the control loop's thread alone. `on_end` is told what is to follow."""

    def __init__(
        self,
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
        log: Callable[[str, str], None],
    ) -> None:
        self.is_leaving = False
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[LaneEnd], None] = lambda _: None
        self._watch = watch
        self._unwatch = unwatch
        self._log = log
        self._steps: LaneSteps | None = None
        self._worker: Worker | None = None

    @property
    def is_busy(self) -> bool:
        return self._steps is not None

    def start(self, steps: LaneSteps) -> None:
        assert self._steps is None
        self._steps = steps
        self._worker = Worker("vm-migration")
        self._watch(self._worker.done.fileno(), self._take_outcomes)
        self.on_begin()
        self._advance(Outcome())

    def end(self) -> None:
        """The loop is over: stop where it stands."""
        if self._worker is not None:
            self._worker.stop(END_S)
            self._worker = None
        self._steps = None

    def _take_outcomes(self) -> None:
        assert self._worker is not None
        self._worker.done.read()
        outcome = self._worker.take()  # there is one at most: the next job comes of it
        if outcome is not None:
            self._advance(outcome)

    def _advance(self, outcome: Outcome) -> None:
        assert self._steps is not None
        assert self._worker is not None
        try:
            if outcome.error is not None:
                job = self._steps.throw(outcome.error)
            else:
                job = self._steps.send(outcome.value)
            while self.is_leaving and not isinstance(job, Cleanup):
                job = self._steps.throw(VmmShuttingDown())
        except StopIteration as end:
            self._finish(end.value)
        except Exception as error:
            self._log("error", f"The migration ended badly: {': '.join(error_chain(error))}")
            self._finish(LaneEnd(error=error))
        else:
            self._worker.submit(job)

    def _finish(self, end: LaneEnd) -> None:
        worker, self._worker, self._steps = self._worker, None, None
        assert worker is not None
        self._unwatch(worker.done.fileno())
        worker.stop(END_S)  # it has nothing left to do
        self.on_end(end)
