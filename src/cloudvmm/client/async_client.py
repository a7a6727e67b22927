"""The client for asyncio."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from cloudvmm.client.async_method import AsyncMethods
from cloudvmm.client.async_stream import AsyncEventStream
from cloudvmm.client.async_transport import AsyncStream, AsyncUnixTransport
from cloudvmm.client.client import LONG_TIMEOUT_S, encode_data, read_reply, refuse_stream
from cloudvmm.client.transport import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from cloudvmm.client.table import Command

T = TypeVar("T")


class AsyncClient(AsyncMethods):
    """What `Client` is, for the tasks of an event loop: any number of them may share one.

    A command has `timeout_s`, or `long_timeout_s` if it moves the guest's memory; None is no limit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        long_timeout_s: float | None = LONG_TIMEOUT_S,
    ) -> None:
        self.transport = AsyncUnixTransport(path, timeout_s=timeout_s)
        self._long_timeout_s = long_timeout_s

    @property
    def path(self) -> str:
        return self.transport.path

    async def call(self, command: Command[T], data: object = None, *, timeout_s: float | None = None) -> T:
        body, fds = encode_data(data)
        if timeout_s is None and command.is_long:
            timeout_s = self._long_timeout_s
        reply = await self.transport.request(command.method, command.name, body, fds, timeout_s=timeout_s)
        value: T = read_reply(command, reply)
        return value

    async def events(self, from_number: int | None = None) -> AsyncEventStream:
        return await AsyncEventStream.start(self._open_stream, from_number)

    def close(self) -> None:
        """Close the connections that are kept. The client can be used again."""
        self.transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _open_stream(self, target: str) -> AsyncStream:
        start = await self.transport.open_stream(target)
        return start if isinstance(start, AsyncStream) else refuse_stream(start)
