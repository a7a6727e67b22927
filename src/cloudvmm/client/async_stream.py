"""Events as they happen, on asyncio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from cloudvmm.client.async_transport import AsyncStream
from cloudvmm.client.deadline import Deadline
from cloudvmm.client.error import NoAnswer
from cloudvmm.client.follow import Follower

if TYPE_CHECKING:
    from cloudvmm.events.hub import Event

OpenStream = Callable[[str], Awaitable[AsyncStream]]


class AsyncEventStream:
    """An iterator of events in order, without gaps. Belongs to one task; `close` it, or use `async with`.

    A lost connection is made anew, and the stream goes on where it was.
    """

    def __init__(self, open_stream: OpenStream, stream: AsyncStream, follower: Follower) -> None:
        self._open = open_stream
        self._follower = follower
        self._stream = stream

    @classmethod
    async def start(cls, open_stream: OpenStream, from_number: int | None) -> AsyncEventStream:
        """:raises ClientError: there is no stream to be had."""
        follower = Follower(from_number)
        return cls(open_stream, await open_stream(follower.target()), follower)

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """Wait for the next event; None when the VMM has ended and there will be none.

        :raises TimeoutError: none came in time; the stream is as it was.
        :raises EventsLost: some can no longer be had; the next call goes on behind them.
        :raises ClientError: the server is lost.
        """
        deadline = Deadline(timeout_s)
        while True:
            if (event := self._follower.take()) is not None:
                return event
            if self._follower.is_over:
                return None
            await self._receive(deadline)

    async def wait_for(self, source: str, event: str, timeout_s: float) -> Event:
        """Take events until one has this source and name, and return it.

        :raises TimeoutError: there was none in time, or the stream has ended.
        :raises EventsLost: it may be among the events that are lost.
        :raises ClientError: the server is lost.
        """
        return await self.wait_until(
            lambda found: (found.source, found.event) == (source, event), timeout_s, name=f"{source}/{event}"
        )

    async def wait_until(
        self, is_wanted: Callable[[Event], bool], timeout_s: float, *, name: str = "such event"
    ) -> Event:
        """Take events until `is_wanted` says yes to one, and return it; `name` is for the errors.

        :raises TimeoutError: there was none in time, or the stream has ended.
        :raises EventsLost: it may be among the events that are lost.
        :raises ClientError: the server is lost.
        """
        deadline = Deadline(timeout_s)
        try:
            while (found := await self.next(deadline.left_s())) is not None:
                if is_wanted(found):
                    return found
        except TimeoutError as error:
            raise TimeoutError(f"There was no {name} in {timeout_s:g} s") from error
        raise TimeoutError(f"The stream has ended without {name}")

    def close(self) -> None:
        """Follow no more."""
        self._stream.close()

    def __aiter__(self) -> AsyncEventStream:
        return self

    async def __anext__(self) -> Event:
        if (event := await self.next()) is None:
            raise StopAsyncIteration
        return event

    async def __aenter__(self) -> AsyncEventStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _receive(self, deadline: Deadline) -> None:
        try:
            piece = await self._stream.read(timeout_s=deadline.left_s())
        except NoAnswer:
            piece = b""
        if piece:
            self._follower.feed(piece)
            return
        self._follower.lost()
        self._stream.close()
        self._stream = await self._open(self._follower.target())
