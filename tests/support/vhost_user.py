"""A vhost-user back end that answers what it is asked and never touches a queue.

That is enough for QEMU to make a device, and for a guest that has no driver for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

HEADER = struct.Struct("=III")
IS_REPLY, WANTS_REPLY, VERSION = 1 << 2, 1 << 3, 1
GET_FEATURES, GET_VRING_BASE, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM = 1, 11, 15, 17
GET_CONFIG, GET_MAX_MEM_SLOTS = 24, 36
FEATURES = 1 << 32 | 1 << 30  # VIRTIO_F_VERSION_1, VHOST_USER_F_PROTOCOL_FEATURES
PROTOCOL_MQ, PROTOCOL_CONFIG = 1 << 0, 1 << 9
QUEUES = 64
MEMORY_SLOTS = 32
CONFIG_HEADER = 12
BACKLOG = 8


class Served(msgspec.Struct, frozen=True):
    """What a back end tells of itself. `config` is padded with zeros; None is a device without any."""

    config: bytes | None
    queues: int


@contextlib.contextmanager
def back_end(path: Path, *, config: bytes | None = None, queues: int = QUEUES) -> Iterator[None]:
    """Serve at the socket `path` until the end, any number of connections."""
    served = Served(config=config, queues=queues)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(BACKLOG)
    accepting = threading.Thread(target=_accept, args=(listener, served))
    accepting.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        listener.close()


def _accept(listener: socket.socket, served: Served) -> None:
    connections: list[tuple[threading.Thread, socket.socket]] = []
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            serving = threading.Thread(target=_serve, args=(connection, served))
            serving.start()
            connections.append((serving, connection))
    for serving, connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        serving.join()
        connection.close()


def _serve(connection: socket.socket, served: Served) -> None:
    with contextlib.suppress(ConnectionError):
        while (header := _receive(connection, HEADER.size)) is not None:
            request, flags, size = HEADER.unpack(header)
            body = _receive(connection, size) if size else b""
            answer = _answer(request, body or b"", served)
            if answer is None and flags & WANTS_REPLY:
                answer = struct.pack("=Q", 0)
            if answer is not None:
                connection.sendall(HEADER.pack(request, VERSION | IS_REPLY, len(answer)) + answer)


def _answer(request: int, body: bytes, served: Served) -> bytes | None:
    numbers = {
        GET_FEATURES: FEATURES,
        GET_PROTOCOL_FEATURES: PROTOCOL_MQ | (0 if served.config is None else PROTOCOL_CONFIG),
        GET_QUEUE_NUM: served.queues,
        GET_MAX_MEM_SLOTS: MEMORY_SLOTS,
    }
    if request in numbers:
        return struct.pack("=Q", numbers[request])
    if request == GET_VRING_BASE:
        return body[:4] + bytes(4)
    if request == GET_CONFIG:
        size = len(body) - CONFIG_HEADER
        return body[:CONFIG_HEADER] + (served.config or b"")[:size].ljust(size, b"\0")
    return None


def _receive(connection: socket.socket, size: int) -> bytes | None:
    data = b""
    while len(data) < size:
        piece, fds, _, _ = socket.recv_fds(connection, size - len(data), 16)
        for fd in fds:
            os.close(fd)
        if not piece:
            return None
        data += piece
    return data
