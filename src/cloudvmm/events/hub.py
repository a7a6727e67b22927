"""Event fan-out: whoever owns the VM emits, any number of listeners take.

A listener is a callable that must not block; one that raises is dropped, the emitter goes on. Events carry
the monotonic time since the hub was made and a number that counts up from 0, so that a stream can be resumed.
The hub keeps the newest `KEPT_EVENTS`, for who reads at a pace of its own or from an earlier number on.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque

from cloudvmm.value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from cloudvmm.events.log import EventLog

KEPT_EVENTS: Final = 4096


class Event(Value):
    """One thing that happened (reference: lifecycle.md section 11). Never changed.

    What `is_ours` is unknown to the reference, and told to readers of our stream alone, and to the log.
    """

    __slots__ = ("number", "monotonic_ns", "source", "event", "properties", "is_ours")  # noqa: RUF023

    def __init__(
        self,
        *,
        number: int,
        monotonic_ns: int,
        source: str,
        event: str,
        properties: dict[str, str] | None = None,
        is_ours: bool = False,
    ) -> None:
        self.number = number
        self.monotonic_ns = monotonic_ns
        self.source = source
        self.event = event
        self.properties = properties
        self.is_ours = is_ours

    def moved(self, *, number: int, monotonic_ns: int) -> Event:
        """Return the same with another place among all."""
        return Event(
            number=number,
            monotonic_ns=monotonic_ns,
            source=self.source,
            event=self.event,
            properties=self.properties,
            is_ours=self.is_ours,
        )


class EventHub:
    """May be used from any thread; events reach every listener in one and the same order."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, *, kept: int = KEPT_EVENTS) -> None:
        self._clock = clock
        self._start_ns = clock()
        # Reentrant: a listener may end its own subscription.
        self._lock = threading.RLock()
        self._listeners: list[Callable[[Event], None]] = []
        self._kept = kept
        self._log: deque[Event] = deque(maxlen=kept)
        self._next_number = 0
        self._file: EventLog | None = None

    @property
    def next_number(self) -> int:
        """The number that the next event will have."""
        return self._next_number

    @property
    def first_kept(self) -> int:
        """The number of the oldest event that is kept; of the next one where none is."""
        with self._lock:
            return self._next_number - len(self._log)

    def since(self, number: int, *, limit: int) -> list[Event]:
        """Return the kept events from `number` on, oldest first, `limit` at most; never waits.

        Where the first one has a higher number, those between are no longer kept.
        """
        with self._lock:
            skipped = max(0, number - self.first_kept)
            return list(itertools.islice(self._log, skipped, skipped + limit))

    def keep(self, path: str) -> None:
        """Write every event to the file `path`, too, and go on after those that are there already.

        What was emitted until now comes behind them. To be done before anybody reads. A file that cannot be
        written is written no more; what is in it that is no event is passed over.
        """
        from cloudvmm.events.log import EventLog  # only with a state folder

        log = EventLog(path, start_ns=self._start_ns)
        with self._lock:
            present, started_ns = list(self._log), self._start_ns
            self._start_ns = log.start_ns
            self._log.clear()
            self._log += log.events[-self._kept :]
            self._next_number = log.events[-1].number + 1 if log.events else 0
            for event in present:
                monotonic_ns = event.monotonic_ns + started_ns - log.start_ns
                moved = event.moved(number=self._next_number, monotonic_ns=monotonic_ns)
                self._log.append(moved)
                log.append(moved)
                self._next_number += 1
            log.events.clear()
            self._listeners.insert(0, log.append)
            self._file = log

    def end_keeping(self) -> None:
        """Write to the file of `keep` no more, and close it. Idempotent."""
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(ValueError):  # it has failed, and was dropped
                    self._listeners.remove(self._file.append)
                self._file.close()
                self._file = None

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` with each event from now on; return what ends that."""
        with self._lock:
            self._listeners.append(listener)
        return lambda: self._remove(listener)

    def emit(
        self,
        source: str,
        event: str,
        properties: dict[str, str] | None = None,
        *,
        is_ours: bool = False,
    ) -> None:
        with self._lock:
            happened = Event(
                number=self._next_number,
                monotonic_ns=self._clock() - self._start_ns,
                source=source,
                event=event,
                properties=properties,
                is_ours=is_ours,
            )
            self._next_number += 1
            self._log.append(happened)
            for listener in list(self._listeners):
                try:
                    listener(happened)
                except Exception:  # a listener's fault must not reach the VM
                    self._remove(listener)

    def _remove(self, listener: Callable[[Event], None]) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)
