"""Programs of the host at both ends of a vsock device's sockets."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from support.deadline import GUEST_S
from support.wait import POLL_EVERY_S


class Call:
    """A connection to a port of the guest, which was answered with `port`."""

    def __init__(self, connection: socket.socket, port: int) -> None:
        self.socket = connection
        self.port = port

    def ask(self, words: bytes) -> bytes:
        """Say `words` and nothing more; return all that comes until the guest's end."""
        self.socket.sendall(words)
        self.socket.shutdown(socket.SHUT_WR)
        return read_all(self.socket)


def dial(path: Path, port: int | str) -> tuple[socket.socket, bytes]:
    """Ask for `port`; return the connection and the line that it is answered with, empty at its end."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(GUEST_S)
    line = b""
    try:
        connection.connect(str(path))
        # One that is refused may be closed before it has said anything.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(f"CONNECT {port}\n".encode())
            while not line.endswith(b"\n") and (byte := connection.recv(1)):
                line += byte
    except BaseException:
        connection.close()
        raise
    return connection, line


@contextlib.contextmanager
def call(path: Path, port: int, *, timeout_s: float = GUEST_S) -> Iterator[Call]:
    """Connect to `port` of the guest, whose program may not listen yet."""
    deadline = time.monotonic() + timeout_s
    while True:
        connection, line = dial(path, port)
        if line or time.monotonic() > deadline:
            break
        connection.close()
        time.sleep(POLL_EVERY_S)
    with connection:
        word, number = line.split()
        assert word == b"OK"
        yield Call(connection, int(number))


@contextlib.contextmanager
def listening_at(path: Path, port: int, *, backlog: int = 128) -> Iterator[socket.socket]:
    """Listen where the guest's connections to `port` of the host arrive."""
    place = Path(f"{path}_{port}")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(GUEST_S)
        listener.bind(str(place))
        try:
            listener.listen(backlog)
            yield listener
        finally:
            place.unlink()


@contextlib.contextmanager
def serve_at(path: Path, port: int) -> Iterator[queue.Queue[bytes]]:
    """Yield a queue into which goes all that the next connection of the guest to `port` says."""
    heard: queue.Queue[bytes] = queue.Queue()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            heard.put(read_all(connection))

    with listening_at(path, port) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield heard
        thread.join(GUEST_S)
        assert not thread.is_alive()


def read_all(connection: socket.socket) -> bytes:
    """Return all that comes until the end."""
    data = bytearray()
    while piece := connection.recv(1 << 18):
        data += piece
    return bytes(data)
