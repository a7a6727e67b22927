"""The events of a VMM in this process, as `client.EventStream` gives those of a server."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cloudvmm.client.deadline import Deadline
from cloudvmm.client.error import EventsLost
from cloudvmm.client.stream import EventStream
from cloudvmm.events.hub import Event, EventHub


class LocalEvents(EventStream):
    """Reads the log of `hub` at its own pace.

    `has_ended` says that no more will come; call `wake` when it changes. `on_close` is told of the end.
    """

    def __init__(
        self,
        hub: EventHub,
        from_number: int | None,
        *,
        has_ended: Callable[[], bool],
        on_close: Callable[[LocalEvents], None],
    ) -> None:
        self._hub = hub
        self._has_ended = has_ended
        self._on_close = on_close
        self._is_closed = False
        self._news = threading.Event()
        self._unsubscribe = hub.subscribe(lambda _: self._news.set())
        self._next_number = hub.next_number if from_number is None else from_number

    def next(self, timeout_s: float | None = None) -> Event | None:
        deadline = Deadline(timeout_s)
        while True:
            self._news.clear()
            # Asked before the log is read, so that an end right after the last event hides nothing.
            has_ended = self._has_ended()
            if self._is_closed:
                return None
            if (event := self._take()) is not None:
                return event
            if has_ended:
                return None
            if not self._news.wait(deadline.left_s()):
                raise TimeoutError("No event came in time")

    def wake(self) -> None:
        """Make a thread in `next` look again."""
        self._news.set()

    def close(self) -> None:
        self._is_closed = True
        self._unsubscribe()
        self._on_close(self)
        self.wake()

    def _take(self) -> Event | None:
        requested, newest = self._next_number, self._hub.next_number
        if requested > newest:
            # Numbers from before this VMM's start: all that it has done is news.
            self._next_number = self._hub.first_kept
            raise EventsLost(requested, self._next_number)
        found = self._hub.since(requested, limit=1)
        if not found:
            return None
        if found[0].number != requested:
            self._next_number = found[0].number
            raise EventsLost(requested, self._next_number)
        self._next_number += 1
        return found[0]
