"""Requests over a UNIX socket, by blocking. Knows HTTP and file descriptors, and no command.

Two connections at most are kept and used again. Any number of threads may call: each request under way has a
connection to itself, so nobody waits for another's long command.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any, Final, TypeVar

from cloudvmm.client.deadline import Deadline
from cloudvmm.client.error import ConnectionFailed, NoAnswer
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

DEFAULT_TIMEOUT_S: Final = 60.0

RETRY_CONNECT_S: Final = 0.01

T = TypeVar("T")


class UnixTransport:
    """Speaks to the server whose socket is at `path`; connects on first use.

    A request has `timeout_s` in all; None is no limit.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        self.path = os.fspath(path)
        self.timeout_s = timeout_s
        self._pool = ConnectionPool()

    def connect(self) -> None:
        """Connect now, for the first request, and not with it.

        :raises ConnectionFailed: there is no server.
        """
        try:
            self._pool.put(connect(self.path, self._deadline(None)))
        except OSError as error:
            raise ConnectionFailed(self.path) from error

    def request(
        self,
        method: str,
        command: str,
        body: bytes | None = None,
        fds: Sequence[int] = (),
        *,
        timeout_s: float | None = None,
    ) -> Reply:
        """Send a request for `command`, such as ``vm.info``, and return the reply, whatever its status.

        Blocks for `timeout_s`, by default the transport's. `fds` are passed along by SCM_RIGHTS and stay the
        caller's, to close in any case.

        :raises ConnectionFailed: it did not reach a server; it has not run.
        :raises NoAnswer: no reply came; it may or may not have run.
        :raises BadReply: the server does not speak HTTP.
        :raises ValueError: there are more than 253 `fds`.
        """
        request = make_request(method, command, body, tuple(fds))
        steps = exchange(self.path, self._pool, request)
        return _carry_out(steps, self.path, self._deadline(timeout_s))

    def open_stream(self, target: str, *, timeout_s: float | None = None) -> Stream | Reply:
        """GET `target`, such as ``vm.events?from=7``, whose body does not end.

        Returns what the server answers instead if that is not a stream. `timeout_s` is for the head alone.

        :raises ClientError: there is no reply; see `request`.
        """
        steps = open_stream(self.path, make_request("GET", target, None))
        start = _carry_out(steps, self.path, self._deadline(timeout_s))
        return Stream(target, start) if isinstance(start, StreamStart) else start

    def close(self) -> None:
        """Close the connections that are kept; a later request opens a new one."""
        self._pool.close()

    def __enter__(self) -> UnixTransport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline(self.timeout_s if timeout_s is None else timeout_s)


class Stream:
    """The body of a reply that goes on. Owns its connection; `close` from any thread ends a `read`."""

    def __init__(self, target: str, start: StreamStart) -> None:
        self._target = target
        self._connection = start.connection
        self._parser = start.parser
        # Held by who reads: a descriptor that is closed under a reader could be another file by then.
        self._lock = threading.Lock()

    def read(self, *, timeout_s: float | None = None) -> bytes:
        """Wait for bytes; empty when the server has ended the stream.

        :raises TimeoutError: none came in time; the stream is as it was.
        :raises NoAnswer: the connection is lost.
        """
        with self._lock:
            if piece := self._parser.take():
                return piece
            try:
                return _receive(self._connection, Deadline(timeout_s))
            except TimeoutError:
                raise
            except OSError as error:
                raise NoAnswer(self._target) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the server was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._connection.close()


def _carry_out(steps: Generator[Step, Any, T], path: str, deadline: Deadline) -> T:
    try:
        step = next(steps)
        while True:
            try:
                outcome = _do(step, path, deadline)
            except OSError as error:
                step = steps.throw(error)
            else:
                step = steps.send(outcome)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()


def _do(step: Step, path: str, deadline: Deadline) -> object:
    if step.connection is None:
        return connect(path, deadline)
    if step.do == "receive":
        return _receive(step.connection, deadline)
    step.connection.settimeout(deadline.left_s())
    return step.connection.sendmsg([step.data], rights(step.fds))


def _receive(connection: socket.socket, deadline: Deadline) -> bytes:
    connection.settimeout(deadline.left_s())
    return connection.recv(RECEIVE_BYTES)


def connect(path: str, deadline: Deadline) -> socket.socket:
    """Return a new connection to the socket at `path`.

    :raises OSError: there is none in time.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(deadline.left_s())
        while True:
            try:
                connection.connect(path)
                return connection
            except BlockingIOError:  # the server's queue is full, and the kernel offers no way to wait
                deadline.left_s()
                time.sleep(RETRY_CONNECT_S)
    except BaseException:
        connection.close()
        raise


def rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """Return the ancillary data of a message that passes `fds`."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
