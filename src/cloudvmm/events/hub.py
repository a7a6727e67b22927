"""Event fan-out: whoever owns the VM emits, any number of listeners take.

A listener is a callable that must not block; one that raises is dropped, the emitter goes on. Events carry
the monotonic time since the hub was made and a number that counts up from 0, so that a stream can be resumed.
The hub keeps the newest `KEPT_EVENTS`, for who reads at a pace of its own or from an earlier number on.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

KEPT_EVENTS: Final = 4096


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened (reference: lifecycle.md section 11).

    What `is_ours` is unknown to the reference, and told to readers of our stream alone, and to the log.
    """

    number: int
    monotonic_ns: int
    source: str
    event: str
    properties: dict[str, str] | None = None
    is_ours: bool = False


Listener = Callable[[Event], None]


class EventHub:
    """May be used from any thread; events reach every listener in one and the same order."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, *, kept: int = KEPT_EVENTS) -> None:
        self._clock = clock
        self._start_ns = clock()
        # Reentrant: a listener may end its own subscription.
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []
        self._log: deque[Event] = deque(maxlen=kept)
        self._next_number = 0

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

    def subscribe(self, listener: Listener) -> Callable[[], None]:
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

    def _remove(self, listener: Listener) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)
