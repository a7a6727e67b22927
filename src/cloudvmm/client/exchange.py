"""One request and its reply, as steps: what to do next on which connection, without doing it.

A generator yields a step, is given what came of it, or has the `OSError` thrown in that it ended with, and
returns the reply. `transport.py` carries the steps out by blocking, `async_transport.py` on asyncio; what may
be sent again, and what is known after a loss, is decided here alone:

* A server acts on a whole request only. While any byte was not sent, it has not run.
* A connection kept from an earlier request may have been closed by the server meanwhile. A request that it
  did not take in whole is sent once more, on a new connection; so is one that only reads.
* Any other loss is reported. A command that changes something is never sent twice.
"""

from __future__ import annotations

import socket
from collections.abc import Generator
from typing import Any, Final, Literal, NamedTuple

from cloudvmm.client.error import ClientError, ConnectionFailed, NoAnswer
from cloudvmm.client.pool import ConnectionPool
from cloudvmm.client.reply import Reply, ReplyParser

MAX_DESCRIPTORS: Final = 253  # of a request; the kernel passes no more in one message
RECEIVE_BYTES: Final = 64 << 10

_ROOT: Final = "/api/v1/"
_STALE: Final = (BrokenPipeError, ConnectionResetError)


class Request(NamedTuple):
    """`raw` is all its bytes. `fds` travel with the first of them and stay the caller's."""

    command: str
    is_repeatable: bool
    raw: bytes
    fds: tuple[int, ...] = ()


class Step(NamedTuple):
    """What to do next, and what the generator wants back.

    connect   a new connected socket
    send      how many bytes of `data` went out; `fds` with the first of them
    receive   the bytes that came; empty when the server has closed
    """

    do: Literal["connect", "send", "receive"]
    connection: socket.socket | None = None
    data: bytes | memoryview = b""
    fds: tuple[int, ...] = ()


Steps = Generator[Step, Any, Reply]


class StreamStart(NamedTuple):
    """`parser` has the head, and perhaps the first bytes of the body."""

    connection: socket.socket
    parser: ReplyParser


class _Lost(Exception):
    """A connection that carries nothing more; `is_unsent`: some of the request never went out."""

    def __init__(self, *, is_unsent: bool, reason: OSError | None) -> None:
        self.is_unsent = is_unsent
        self.reason = reason


def make_request(method: str, command: str, body: bytes | None, fds: tuple[int, ...] = ()) -> Request:
    """Lay a request out as the reference's own client does.

    :raises ValueError: there are more `fds` than one message can carry.
    """
    if len(fds) > MAX_DESCRIPTORS:
        raise ValueError(f"A request carries {MAX_DESCRIPTORS} file descriptors at most, not {len(fds)}")
    head = f"{method} {_ROOT}{command} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n"
    if body is None:
        return Request(command, method == "GET", f"{head}\r\n".encode(), fds)
    head = f"{head}Content-Length: {len(body)}\r\n\r\n"
    return Request(command, method == "GET", head.encode() + body, fds)


def exchange(path: str, pool: ConnectionPool, request: Request) -> Steps:
    """Send `request` and return the reply. Takes a connection from `pool`, and puts one back if it can.

    :raises ClientError: there is no reply.
    """
    while True:
        kept = pool.take()
        connection = yield from _connect(path) if kept is None else _just(kept)
        parser = ReplyParser()
        is_kept = False
        try:
            reply = yield from _ask(connection, request, parser)
            is_kept = not (reply.ends_connection or reply.is_stream or parser.has_more)
        except _Lost as loss:
            if kept is not None and _may_repeat(request, loss):
                continue
            raise _report(loss, path, request) from loss.reason
        finally:
            if is_kept:
                pool.put(connection)
            else:
                connection.close()
        return reply


def open_stream(path: str, request: Request) -> Generator[Step, Any, StreamStart | Reply]:
    """Send `request` on a connection of its own; return the stream's start, or what came instead.

    :raises ClientError: there is no reply.
    """
    connection = yield from _connect(path)
    parser = ReplyParser()
    is_kept = False
    try:
        reply = yield from _ask(connection, request, parser)
        is_kept = reply.is_stream
    except _Lost as loss:
        raise _report(loss, path, request) from loss.reason
    finally:
        if not is_kept:
            connection.close()
    return StreamStart(connection, parser) if is_kept else reply


def _just(connection: socket.socket) -> Generator[Step, Any, socket.socket]:
    yield from ()
    return connection


def _connect(path: str) -> Generator[Step, Any, socket.socket]:
    try:
        connection: socket.socket = yield Step("connect")
    except OSError as error:
        raise ConnectionFailed(path) from error
    return connection


def _ask(connection: socket.socket, request: Request, parser: ReplyParser) -> Steps:
    unsent: OSError | None = None
    try:
        yield from _send(connection, request)
    except OSError as error:
        # A server that has no room says so and closes without reading; what it said is still there.
        if not isinstance(error, _STALE):
            raise _Lost(is_unsent=True, reason=error) from None
        unsent = error
    try:
        return (yield from _receive(connection, parser))
    except _Lost as loss:
        if unsent is not None:
            raise _Lost(is_unsent=True, reason=unsent) from None
        raise loss from None


def _send(connection: socket.socket, request: Request) -> Generator[Step, Any, None]:
    left, fds = memoryview(request.raw), request.fds
    while left:
        sent: int = yield Step("send", connection, left, fds)
        left, fds = left[sent:], ()


def _receive(connection: socket.socket, parser: ReplyParser) -> Steps:
    """Return the reply; of a stream its head alone."""
    reply: Reply | None = None
    while reply is None:
        try:
            piece: bytes = yield Step("receive", connection)
        except OSError as error:
            raise _Lost(is_unsent=False, reason=error) from None
        reply = parser.feed(piece) if piece else parser.end()
        if reply is None and not piece:
            raise _Lost(is_unsent=False, reason=None)
        if reply is None and parser.head is not None and parser.head.is_stream:
            return parser.head
    return reply


def _may_repeat(request: Request, loss: _Lost) -> bool:
    if loss.reason is not None and not isinstance(loss.reason, _STALE):
        return False
    return loss.is_unsent or request.is_repeatable


def _report(loss: _Lost, path: str, request: Request) -> ClientError:
    return ConnectionFailed(path) if loss.is_unsent else NoAnswer(request.command)
