"""Threads beside the control loop: one that changes the VM, one that reads from it.

A worker takes one job at a time, in order, and talks to the engine; what comes of it goes back to the loop,
which alone commits state. The reader is another one of the kind, for questions that must not wait behind a
command.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

import msgspec

from cloudvmm.api.data import ApiResponsePayload
from cloudvmm.host.eventfd import EventFd

Job = Callable[[], Any]
# What a command is made of: it hands out jobs, gets back what they return, and ends with its answer.
Steps = Generator[Job, Any, ApiResponsePayload]


class Cleanup(msgspec.Struct, frozen=True):
    """A job that is carried out even while the VMM is told to leave: it releases what would be lost."""

    job: Job

    def __call__(self) -> None:
        self.job()


class Outcome(msgspec.Struct, frozen=True):
    """What a job returned, or the error it raised."""

    value: Any = None
    error: Exception | None = None


class Worker:
    """One thread, one job at a time; `done` is rung when an outcome can be taken."""

    def __init__(self, name: str) -> None:
        self.done = EventFd()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._name = name
        try:
            self._thread = self._start(None)
        except RuntimeError:
            self.done.close()
            raise

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def take(self) -> Outcome | None:
        """Return the next outcome, or None; never blocks."""
        # Nobody else takes, so what is there stays there.
        return None if self._outcomes.empty() else self._outcomes.get_nowait()

    def renew(self) -> None:
        """Let another thread go on once the present one has done its jobs. It inherits what is the caller's.

        :raises RuntimeError: the host gives no thread; then nobody does the jobs that come.
        """
        self._jobs.put(None)
        self._thread = self._start(self._thread)

    def stop(self, timeout_s: float) -> bool:
        """Finish what is queued, end the thread, wait for it; False where it did not end in time."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self.done.close()
        return True

    def _start(self, before: threading.Thread | None) -> threading.Thread:
        thread = threading.Thread(target=self._run, args=(before,), name=self._name, daemon=True)
        thread.start()
        return thread

    def _run(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        while (job := self._jobs.get()) is not None:
            try:
                outcome = Outcome(value=job())
            except Exception as error:
                outcome = Outcome(error=error)
            self._outcomes.put(outcome)
            self.done.write()
