"""A server that follows a script of bytes: for clients, what `rest.ScriptedVmm` is for servers."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable

from support.deadline import HOST_S

TIMEOUT_S = HOST_S
_FD_ROOM = 253


class Talk:
    """One accepted connection. Descriptors that came are kept in `fds` and closed with it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.fds: list[int] = []
        self.received = b""

    def read_request(self) -> bytes:
        """Return one whole request; empty if the client has closed instead."""
        while not self._is_whole():
            piece, fds, _, _ = socket.recv_fds(self._connection, 65536, _FD_ROOM)
            self.fds += fds
            if not piece:
                return b""
            self.received += piece
        request, self.received = self.received, b""
        return request

    def send(self, raw: bytes) -> None:
        self._connection.sendall(raw)

    def keep_answering(self, reply: bytes, *, idle_s: float) -> None:
        """Answer every request so until the client closes, or asks nothing for `idle_s`."""
        self._connection.settimeout(idle_s)
        with contextlib.suppress(TimeoutError):
            while self.read_request():
                self.send(reply)

    def wait_closed(self) -> bool:
        """Wait for the client to close; False if it sends something instead."""
        return self._connection.recv(1) == b""

    def close(self) -> None:
        self._connection.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def _is_whole(self) -> bool:
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = [int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")]
        return bool(end) and len(body) >= sum(length)


class Peer:
    """Listens at `path`; each connection is played by the next of `scripts`, on a thread of its own.

    The first thing to go wrong in a script is raised by `close`.
    """

    def __init__(self, path: str, *scripts: Callable[[Talk], object]) -> None:
        self._scripts = scripts
        self._failures: list[BaseException] = []
        self._played = threading.Semaphore(0)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen()
        self._listener.settimeout(TIMEOUT_S)
        self._thread = threading.Thread(target=self._run, name="peer")
        self._thread.start()

    def wait_played(self) -> None:
        """Wait until one more script has ended and its connection is closed."""
        assert self._played.acquire(timeout=TIMEOUT_S), "No script has ended"

    def close(self) -> None:
        """Wait until every script has been played; the socket's file goes."""
        self._thread.join()
        path = self._listener.getsockname()
        self._listener.close()
        os.unlink(path)
        if self._failures:
            raise self._failures[0]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        players = []
        try:
            for script in self._scripts:
                connection, _ = self._listener.accept()
                connection.settimeout(TIMEOUT_S)
                players.append(threading.Thread(target=self._play, args=(script, connection)))
                players[-1].start()
        except BaseException as failure:
            self._failures.append(failure)
        for player in players:
            player.join()

    def _play(self, script: Callable[[Talk], object], connection: socket.socket) -> None:
        try:
            with contextlib.closing(Talk(connection)) as talk:
                script(talk)
        except BaseException as failure:
            self._failures.append(failure)
        finally:
            self._played.release()


def answering(*replies: bytes) -> Callable[[Talk], None]:
    """Play a connection that answers one request after the other, then closes."""

    def script(talk: Talk) -> None:
        for reply in replies:
            talk.read_request()
            talk.send(reply)

    return script
