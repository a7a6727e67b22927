"""`vm.events`: a connection that has become a stream of server-sent events (docs/events.md).

A stream reads the hub's log at its reader's pace, so it holds nothing back itself and delays nobody. Whoever
is so slow that the log has moved on is told what is missing; whoever takes nothing at all is let go. This
path alone has a query; all others are matched as they are.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import Final

from cloudvmm.events.hub import EventHub
from cloudvmm.events.sse import KEEP_ALIVE, end_frame, event_frame, gap_frame, position_frame
from cloudvmm.host.eventfd import EventFd
from cloudvmm.http.error import BadQuery, WrongMethod
from cloudvmm.wire.http import Request
from cloudvmm.wire.response import STREAM_HEAD

KEEP_ALIVE_S: Final = 15.0
STALL_S: Final = 60.0  # how long a reader may take nothing while there is something to send

_BATCH_EVENTS: Final = 64
_DRAIN_BYTES: Final = 4096
_MAX_NUMBER: Final = 2**64 - 1


def first_wanted(request: Request) -> int | None:
    """Return the number of the first event that the client wants; None for whatever comes next.

    `Last-Event-ID` wins over `from`: who comes back sends the query of the first time beside it.

    :raises WrongMethod: it is not a GET.
    :raises BadQuery: query or header is not what it must be.
    """
    if request.method != "GET":
        raise WrongMethod
    _, has_query, query = request.path.partition("?")
    wanted = None
    if has_query:
        name, _, value = query.partition("=")
        if name != "from":
            raise BadQuery
        wanted = _number(value)
    if request.last_event_id:
        wanted = _number(request.last_event_id) + 1
    return wanted


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or (number := int(text)) > _MAX_NUMBER:
        raise BadQuery
    return number


class Stream:
    """One reader's stream on `client`, which is lent. `ending` is set by whoever wants it to end."""

    def __init__(
        self,
        client: socket.socket,
        hub: EventHub,
        *,
        ending: threading.Event,
        keep_alive_s: float = KEEP_ALIVE_S,
        stall_s: float = STALL_S,
    ) -> None:
        """:raises OSError: there is no descriptor left for it."""
        self._client = client
        self._hub = hub
        self._ending = ending
        self._keep_alive_ms = round(keep_alive_s * 1000)
        self._stall_s = stall_s
        self._wake = EventFd()
        self._poller = select.poll()
        self._poller.register(self._wake, select.POLLIN)
        self._poller.register(client, select.POLLIN)

    def wake(self) -> None:
        """Make the stream look at `ending`. Any thread; a stream that has ended takes no notice."""
        with contextlib.suppress(OSError):
            self._wake.write()

    def close(self) -> None:
        """Release what a stream that does not run holds."""
        self._wake.close()

    def run(self, first: int | None) -> None:
        """Send events from number `first` on (from the next one if None) until `ending`, or the client goes.

        Blocks as long as that takes. At `ending` what the log still has is sent first.

        :raises OSError: the client is gone, or takes nothing.
        """
        unsubscribe = self._hub.subscribe(lambda _: self._wake.write())
        try:
            self._client.settimeout(self._stall_s)
            self._send_all(first)
        finally:
            unsubscribe()
            self.close()

    def _send_all(self, first: int | None) -> None:
        head = STREAM_HEAD
        next_number = self._hub.next_number if first is None else first
        if next_number > self._hub.next_number:
            # Numbers from before this VMM's start: all that it has done is news.
            next_number = self._hub.first_kept
            head += gap_frame(requested=first or 0, first=next_number)
        elif first is None and next_number > 0:
            # Whoever is cut off before an event comes can then come back without missing one.
            head += position_frame(next_number - 1)
        self._client.sendall(head)
        while True:
            is_ending = self._ending.is_set()
            events = self._hub.since(next_number, limit=_BATCH_EVENTS)
            if events:
                found = events[0].number
                gap = gap_frame(requested=next_number, first=found) if found != next_number else b""
                self._client.sendall(gap + b"".join(map(event_frame, events)))
                next_number = events[-1].number + 1
            elif is_ending:
                self._client.sendall(end_frame(next_number=next_number))
                return
            elif not self._wait():
                return

    def _wait(self) -> bool:
        """Wait for news, keeping the connection alive; return whether the client is still there."""
        ready = self._poller.poll(self._keep_alive_ms)
        if not ready:
            self._client.sendall(KEEP_ALIVE)
        for fd, what in ready:
            if fd == self._wake.fileno():
                self._wake.read()
            elif what & (select.POLLHUP | select.POLLERR):
                return False
            elif not self._client.recv(_DRAIN_BYTES):
                # It will send nothing more, and may well go on reading: only its leaving is of interest.
                self._poller.modify(self._client, 0)
        return True
