"""Events as they happen, by blocking: what `Methods.events` returns, and its form over a socket."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING

from cloudvmm.client.deadline import Deadline
from cloudvmm.client.error import NoAnswer
from cloudvmm.client.follow import Follower
from cloudvmm.client.transport import Stream

if TYPE_CHECKING:
    from cloudvmm.events.hub import Event

OpenStream = Callable[[str], Stream]


class EventStream(abc.ABC):
    """An iterator of events in order, without gaps. Belongs to one thread; `close` it, or use `with`.

    Any thread may close it, which ends the iteration.
    """

    @abc.abstractmethod
    def next(self, timeout_s: float | None = None) -> Event | None:
        """Wait for the next event; None when there will be none: the VMM has ended, or the stream is closed.

        :raises TimeoutError: none came in time; the stream is as it was.
        :raises EventsLost: some can no longer be had; the next call goes on behind them.
        :raises ClientError: the server is lost.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Follow no more."""

    def wait_for(self, source: str, event: str, timeout_s: float) -> Event:
        """Take events until one has this source and name, and return it.

        :raises TimeoutError: there was none in time, or the stream has ended.
        :raises EventsLost: it may be among the events that are lost.
        :raises ClientError: the server is lost.
        """
        return self.wait_until(
            lambda found: (found.source, found.event) == (source, event), timeout_s, name=f"{source}/{event}"
        )

    def wait_until(
        self, is_wanted: Callable[[Event], bool], timeout_s: float, *, name: str = "such event"
    ) -> Event:
        """Take events until `is_wanted` says yes to one, and return it; `name` is for the errors.

        :raises TimeoutError: there was none in time, or the stream has ended.
        :raises EventsLost: it may be among the events that are lost.
        :raises ClientError: the server is lost.
        """
        deadline = Deadline(timeout_s)
        try:
            while (found := self.next(deadline.left_s())) is not None:
                if is_wanted(found):
                    return found
        except TimeoutError as error:
            raise TimeoutError(f"There was no {name} in {timeout_s:g} s") from error
        raise TimeoutError(f"The stream has ended without {name}")

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Event:
        if (event := self.next()) is None:
            raise StopIteration
        return event

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RemoteEvents(EventStream):
    """The stream of a server. A lost connection is made anew, and the stream goes on where it was."""

    def __init__(self, open_stream: OpenStream, from_number: int | None) -> None:
        """:raises ClientError: there is no stream to be had."""
        self._open = open_stream
        self._follower = Follower(from_number)
        self._is_closed = False
        self._stream = open_stream(self._follower.target())

    def next(self, timeout_s: float | None = None) -> Event | None:
        deadline = Deadline(timeout_s)
        while True:
            if (event := self._follower.take()) is not None:
                return event
            if self._follower.is_over or self._is_closed:
                return None
            self._receive(deadline)

    def close(self) -> None:
        self._is_closed = True
        self._stream.close()

    def _close_if_late(self) -> None:
        """Close a stream that was opened anew while another thread closed this one."""
        if self._is_closed:
            self._stream.close()

    def _receive(self, deadline: Deadline) -> None:
        try:
            piece = self._stream.read(timeout_s=deadline.left_s())
        except NoAnswer:
            piece = b""
        if piece:
            self._follower.feed(piece)
        elif not self._is_closed:
            self._follower.lost()
            self._stream.close()
            self._stream = self._open(self._follower.target())
            self._close_if_late()
