"""Event fan-out: whoever owns the VM emits, any number of listeners take.

A listener is a callable that must not block; one that raises is dropped, the emitter goes on. Events carry
the monotonic time since the hub was made and a number that counts up from 0, so that a stream can be resumed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened (reference: lifecycle.md section 11)."""

    number: int
    monotonic_ns: int
    source: str
    event: str
    properties: dict[str, str] | None = None


Listener = Callable[[Event], None]


class EventHub:
    """May be used from any thread; events reach every listener in one and the same order."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._start_ns = clock()
        # Reentrant: a listener may end its own subscription.
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []
        self._next_number = 0

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each event from now on; return what ends that."""
        with self._lock:
            self._listeners.append(listener)
        return lambda: self._remove(listener)

    def emit(self, source: str, event: str, properties: dict[str, str] | None = None) -> None:
        with self._lock:
            happened = Event(
                number=self._next_number,
                monotonic_ns=self._clock() - self._start_ns,
                source=source,
                event=event,
                properties=properties,
            )
            self._next_number += 1
            for listener in list(self._listeners):
                try:
                    listener(happened)
                except Exception:  # a listener's fault must not reach the VM
                    self._remove(listener)

    def _remove(self, listener: Listener) -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)
