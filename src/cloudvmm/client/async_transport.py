"""Requests over a UNIX socket on asyncio: the steps of `exchange.py`, awaited."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from cloudvmm.client.deadline import Deadline
from cloudvmm.client.error import NoAnswer
from cloudvmm.client.exchange import (
    RECEIVE_BYTES,
    Step,
    StreamStart,
    exchange,
    make_request,
    open_stream,
)
from cloudvmm.client.pool import ConnectionPool
from cloudvmm.client.reply import Reply
from cloudvmm.client.transport import DEFAULT_TIMEOUT_S, RETRY_CONNECT_S, rights

T = TypeVar("T")


class AsyncUnixTransport:
    """What `UnixTransport` is, for the tasks of an event loop.

    A task that is cancelled closes its connection.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self._pool = ConnectionPool()

    async def request(
        self,
        method: str,
        command: str,
        body: bytes | None = None,
        fds: Sequence[int] = (),
        *,
        timeout_s: float | None = None,
    ) -> Reply:
        """Send a request for `command` and return the reply; see `UnixTransport.request`."""
        steps = exchange(self.path, self._pool, make_request(method, command, body, tuple(fds)))
        return await _carry_out(steps, self.path, self._deadline(timeout_s))

    async def open_stream(self, target: str, *, timeout_s: float | None = None) -> AsyncStream | Reply:
        """GET `target`, whose body does not end; see `UnixTransport.open_stream`."""
        steps = open_stream(self.path, make_request("GET", target, None))
        start = await _carry_out(steps, self.path, self._deadline(timeout_s))
        return AsyncStream(target, start) if isinstance(start, StreamStart) else start

    def close(self) -> None:
        """Close the connections that are kept; a later request opens a new one."""
        self._pool.close()

    def _deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline(self.timeout_s if timeout_s is None else timeout_s)


class AsyncStream:
    """The body of a reply that goes on. Owns its connection."""

    def __init__(self, target: str, start: StreamStart) -> None:
        self._target = target
        self._connection = start.connection
        self._parser = start.parser

    async def read(self, *, timeout_s: float | None = None) -> bytes:
        """Wait for bytes; empty when the server has ended the stream.

        :raises TimeoutError: none came in time; the stream is as it was.
        :raises NoAnswer: the connection is lost.
        """
        if piece := self._parser.take():
            return piece
        try:
            async with asyncio.timeout(timeout_s):
                return await _receive(self._connection)
        except TimeoutError:
            raise
        except OSError as error:
            raise NoAnswer(self._target) from error

    def close(self) -> None:
        """Not while a task reads."""
        self._connection.close()


async def _carry_out(steps: Generator[Step, Any, T], path: str, deadline: Deadline) -> T:
    with contextlib.closing(steps):
        try:
            step = next(steps)
            while True:
                try:
                    async with asyncio.timeout(deadline.left_s()):
                        outcome = await _do(step, path)
                except TimeoutError as error:
                    step = steps.throw(error if error.args else TimeoutError("timed out"))
                except OSError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)
        except StopIteration as end:
            result: T = end.value
            return result


async def _do(step: Step, path: str) -> object:
    if step.connection is None:
        return await _connect(path)
    step.connection.setblocking(False)
    if step.do == "receive":
        return await _receive(step.connection)
    return await _send(step.connection, step.data, step.fds)


async def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        while True:
            try:
                connection.connect(path)
                return connection
            except BlockingIOError:  # the server's queue is full, and the kernel offers no way to wait
                await asyncio.sleep(RETRY_CONNECT_S)
    except BaseException:
        connection.close()
        raise


async def _receive(connection: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(connection, RECEIVE_BYTES)


async def _send(connection: socket.socket, data: bytes | memoryview, fds: tuple[int, ...]) -> int:
    while True:
        try:
            return connection.sendmsg([data], rights(fds))
        except BlockingIOError:
            await _wait_writable(connection)


async def _wait_writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    writable: asyncio.Future[None] = loop.create_future()
    loop.add_writer(connection, _settle, writable)
    try:
        await writable
    finally:
        loop.remove_writer(connection)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
