"""A vhost-user front end and its guest's driver, in Python: it sets rings up in a memfd and fills them."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Sequence

from cloudvmm.vhost.message import Kind
from support.deadline import HOST_S

MEMORY_BYTES = 1 << 20
GUEST_BASE = 0x4000_0000
USER_BASE = 0x7F00_0000_0000
RING_BYTES = 0x4000
BUFFERS_AT = 0x10000
RING_SIZE = 16
HAS_NEXT, WRITABLE = 1, 2
_AVAILABLE, _USED = 0x1000, 0x2000
_TIMEOUT_S = HOST_S


class FrontEnd:
    """One end of a connection to a back end. Owns the memory and every descriptor."""

    def __init__(self, connection: socket.socket, *, rings: int = 2) -> None:
        self.connection = connection
        self.connection.settimeout(_TIMEOUT_S)
        self.memory_fd = os.memfd_create("front-end", os.MFD_CLOEXEC)
        os.ftruncate(self.memory_fd, MEMORY_BYTES)
        self.rings = [GuestRing(self.memory_fd, RING_BYTES * index) for index in range(rings)]

    def send(self, kind: int, content: bytes = b"", *, fds: Sequence[int] = (), flags: int = 1) -> None:
        data = struct.pack("=III", kind, flags, len(content)) + content
        socket.send_fds(self.connection, [data], list(fds))

    def ask(self, kind: int, content: bytes = b"", *, fds: Sequence[int] = (), flags: int = 1) -> bytes:
        """Send a message and return the content of the answer."""
        self.send(kind, content, fds=fds, flags=flags)
        answered, answer_flags, size = struct.unpack("=III", self._read(12))
        assert (answered, answer_flags) == (kind, 5)
        return self._read(size)

    def ask_u64(self, kind: int, content: bytes = b"", *, flags: int = 1) -> int:
        return struct.unpack("=Q", self.ask(kind, content, flags=flags))[0]

    def negotiate(self) -> None:
        features = self.ask_u64(Kind.GET_FEATURES)
        self.send(Kind.SET_PROTOCOL_FEATURES, struct.pack("=Q", self.ask_u64(Kind.GET_PROTOCOL_FEATURES)))
        self.send(Kind.SET_FEATURES, struct.pack("=Q", features))

    def share_memory(self) -> None:
        table = struct.pack("=II4Q", 1, 0, GUEST_BASE, MEMORY_BYTES, USER_BASE, 0)
        self.send(Kind.SET_MEM_TABLE, table, fds=[self.memory_fd])

    def start(self, *, bases: Sequence[int] = (0, 0)) -> None:
        for index, (ring, base) in enumerate(zip(self.rings, bases, strict=True)):
            self.send(Kind.SET_VRING_NUM, struct.pack("=II", index, RING_SIZE))
            self.send(Kind.SET_VRING_BASE, struct.pack("=II", index, base))
            start = USER_BASE + ring.start
            addresses = (start, start + _USED, start + _AVAILABLE, 0)
            self.send(Kind.SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, *addresses))
            self.send(Kind.SET_VRING_KICK, struct.pack("=Q", index), fds=[ring.kick_fd])
            self.send(Kind.SET_VRING_CALL, struct.pack("=Q", index), fds=[ring.call_fd])
            self.send(Kind.SET_VRING_ENABLE, struct.pack("=II", index, 1))
        self.settle()

    def stop(self) -> list[int]:
        """Return where the rings stopped."""
        return [
            struct.unpack("=II", self.ask(Kind.GET_VRING_BASE, struct.pack("=II", index, 0)))[1]
            for index in range(len(self.rings))
        ]

    def settle(self) -> None:
        """Return once the back end has done all that was sent."""
        self.ask(Kind.GET_QUEUE_NUM)

    def close(self) -> None:
        self.connection.close()
        os.close(self.memory_fd)
        for ring in self.rings:
            ring.close()

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.connection.recv(size - len(data))
            assert piece, "The back end left"
            data += piece
        return data


class GuestRing:
    """The driver's side of one ring, at `start` in the memory. Descriptor numbers are the test's business."""

    def __init__(self, memory_fd: int, start: int) -> None:
        self.start = start
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._memory_fd = memory_fd
        self._offered = 0
        self._seen = 0

    def describe(self, index: int, address: int, size: int, flags: int = 0, following: int = 0) -> None:
        data = struct.pack("<QIHH", address, size, flags, following)
        os.pwrite(self._memory_fd, data, self.start + 16 * index)

    def offer(self, head: int, *, kick: bool = True) -> None:
        os.pwrite(
            self._memory_fd,
            struct.pack("<H", head),
            self.start + _AVAILABLE + 4 + 2 * (self._offered % RING_SIZE),
        )
        self._offered = self._offered + 1 & 0xFFFF
        self.set_offered(self._offered)
        if kick:
            self.kick()

    def set_offered(self, index: int) -> None:
        os.pwrite(self._memory_fd, struct.pack("<H", index), self.start + _AVAILABLE + 2)

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def returned(self, *, timeout_s: float = _TIMEOUT_S) -> tuple[int, int] | None:
        """Return the next buffer that came back, (head, size written); None where none does in time."""
        poller = select.poll()
        poller.register(self.call_fd, select.POLLIN)
        while self._used_index() == self._seen:
            if not poller.poll(timeout_s * 1000):
                return None
            os.eventfd_read(self.call_fd)
        at = self.start + _USED + 4 + 8 * (self._seen % RING_SIZE)
        self._seen = self._seen + 1 & 0xFFFF
        return struct.unpack("<II", os.pread(self._memory_fd, 8, at))

    def forget(self) -> None:
        """Begin anew, as a driver does that is loaded again."""
        os.pwrite(self._memory_fd, bytes(RING_BYTES), self.start)
        self._offered = self._seen = 0

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)

    def _used_index(self) -> int:
        return struct.unpack("<H", os.pread(self._memory_fd, 2, self.start + _USED + 2))[0]
