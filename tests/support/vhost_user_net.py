"""A vhost-user-net back end of the tests' own: what the guest sends goes to a TAP, and the other way round.

It knows split rings without indirect descriptors and without any offload, and serves one connection after
another, each in the thread that it owns.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import struct
import threading
from pathlib import Path

from support.deadline import HOST_S
from support.wait import wait_until

VERSION_1, PROTOCOL_FEATURES = 1 << 32, 1 << 30
MULTI_QUEUE = 1
QUEUE_PAIRS = 4
HEADER_BYTES = 12  # struct virtio_net_hdr
FRAME_BYTES = 65536
NEXT, NO_INTERRUPT = 1, 1
_MESSAGE = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_REPLY = 1 | 4


class Region:
    def __init__(self, fd: int, guest: int, size: int, user: int, offset: int) -> None:
        self.guest, self.user, self.size, self.offset = guest, user, size, offset
        self.memory = mmap.mmap(fd, size + offset)
        os.close(fd)


class Memory:
    """The guest's RAM. A place in it is a memory map and an offset into that."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def place(self, address: int, *, is_user: bool = False) -> tuple[mmap.mmap, int]:
        for region in self.regions:
            start = region.user if is_user else region.guest
            if start <= address < start + region.size:
                return region.memory, address - start + region.offset
        raise AssertionError(f"No memory at {address:#x}")

    def close(self) -> None:
        for region in self.regions:
            region.memory.close()
        self.regions = []


class Ring:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.size = self.seen = 0
        self.addresses: tuple[int, int, int] | None = None
        self.kick = self.call = -1

    def pop(self) -> int | None:
        """Return the head of the next chain that the guest offers."""
        if self.addresses is None or self.kick < 0:
            return None
        available, at = self.memory.place(self.addresses[2], is_user=True)
        (index,) = struct.unpack_from("<H", available, at + 2)
        if index == self.seen:
            return None
        (head,) = struct.unpack_from("<H", available, at + 4 + 2 * (self.seen % self.size))
        self.seen = (self.seen + 1) & 0xFFFF
        return int(head)

    def buffers(self, head: int) -> list[tuple[mmap.mmap, int, int]]:
        assert self.addresses is not None
        table, at = self.memory.place(self.addresses[0], is_user=True)
        found = []
        while True:
            address, length, flags, following = struct.unpack_from("<QIHH", table, at + 16 * head)
            found.append((*self.memory.place(address), length))
            if not flags & NEXT:
                return found
            head = following

    def push(self, head: int, length: int) -> None:
        """Give the chain `head` back, `length` bytes of which were written."""
        assert self.addresses is not None
        used, at = self.memory.place(self.addresses[1], is_user=True)
        (index,) = struct.unpack_from("<H", used, at + 2)
        struct.pack_into("<II", used, at + 4 + 8 * (index % self.size), head, length)
        struct.pack_into("<H", used, at + 2, (index + 1) & 0xFFFF)
        available, at = self.memory.place(self.addresses[2], is_user=True)
        (flags,) = struct.unpack_from("<H", available, at)
        if self.call >= 0 and not flags & NO_INTERRUPT:
            os.write(self.call, _U64.pack(1))


class VhostUserNet:
    """Serves at `path`, or connects there if `connects`. `tap` is the descriptor of a TAP, lent."""

    def __init__(self, path: Path, tap: int, *, connects: bool = False) -> None:
        self.path = path
        self.tap = tap
        self.connections = 0
        self._stop_read, self._stop_write = os.pipe()
        self._listener = socket.socket(socket.AF_UNIX)
        if not connects:
            self._listener.bind(str(path))
            self._listener.listen(1)
        self._connects = connects
        self._thread = threading.Thread(target=self._serve, name="vhost-user-net")
        self._thread.start()

    def close(self) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join(HOST_S)
        assert not self._thread.is_alive()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        os.close(self._stop_read)
        os.close(self._stop_write)

    def _serve(self) -> None:
        while (connection := self._next_connection()) is not None:
            self.connections += 1
            with connection, contextlib.suppress(ConnectionError):
                session = Session(connection, self.tap)
                try:
                    if not session.run(self._stop_read):
                        return
                finally:
                    session.close()

    def _next_connection(self) -> socket.socket | None:
        while self._connects:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if select.select([self._stop_read], [], [], 0.02)[0]:
                    return None
            else:
                return connection
        readable, _, _ = select.select([self._listener, self._stop_read], [], [])
        return None if self._stop_read in readable else self._listener.accept()[0]


class Session:
    """One connection with QEMU."""

    def __init__(self, connection: socket.socket, tap: int) -> None:
        self.connection = connection
        self.tap = tap
        self.memory = Memory()
        self.rings = [Ring(self.memory) for _ in range(2 * QUEUE_PAIRS)]

    def run(self, stop: int) -> bool:
        """Serve until QEMU hangs up, and return True; or until `stop` is readable."""
        while True:
            kicks = [ring.kick for ring in self.rings if ring.kick >= 0]
            sources = [self.connection, stop, *kicks]
            if kicks:
                sources.append(self.tap)
            readable, _, _ = select.select(sources, [], [])
            if stop in readable:
                return False
            for kick in kicks:
                if kick in readable:
                    os.read(kick, 8)
            if self.connection in readable and not self._message():
                return True
            for ring in self.rings[1::2]:
                self._transmit(ring)
            if self.tap in readable:
                self._receive(self.rings[0])

    def close(self) -> None:
        for ring in self.rings:
            for fd in (ring.kick, ring.call):
                if fd >= 0:
                    os.close(fd)
        self.memory.close()

    def _transmit(self, ring: Ring) -> None:
        while (head := ring.pop()) is not None:
            frame = b"".join(memory[at : at + length] for memory, at, length in ring.buffers(head))
            with contextlib.suppress(OSError):  # the interface is down
                os.write(self.tap, frame[HEADER_BYTES:])
            ring.push(head, 0)

    def _receive(self, ring: Ring) -> None:
        frame = bytes(HEADER_BYTES - 2) + b"\x01\x00" + os.read(self.tap, FRAME_BYTES)
        head = ring.pop()
        if head is None:
            return  # as a network card without buffers does
        left = frame
        for memory, at, length in ring.buffers(head):
            piece, left = left[:length], left[length:]
            memory[at : at + len(piece)] = piece
        ring.push(head, len(frame) - len(left))

    def _message(self) -> bool:
        head, fds, _, _ = socket.recv_fds(self.connection, _MESSAGE.size, 8)
        if not head:
            return False
        request, _, size = _MESSAGE.unpack(head)
        payload = self.connection.recv(size, socket.MSG_WAITALL) if size else b""
        answer = self._carry_out(request, payload, fds)
        if answer is not None:
            self.connection.sendall(_MESSAGE.pack(request, _REPLY, len(answer)) + answer)
        return True

    def _carry_out(self, request: int, payload: bytes, fds: list[int]) -> bytes | None:
        match request:
            case 1:  # GET_FEATURES
                return _U64.pack(VERSION_1 | PROTOCOL_FEATURES)
            case 5:  # SET_MEM_TABLE
                self.memory.close()
                self.memory.regions = [
                    Region(fd, *struct.unpack_from("<QQQQ", payload, 8 + 32 * number))
                    for number, fd in enumerate(fds)
                ]
            case 15:  # GET_PROTOCOL_FEATURES
                return _U64.pack(MULTI_QUEUE)
            case 17:  # GET_QUEUE_NUM
                return _U64.pack(QUEUE_PAIRS)
            case 12 | 13 | 14:  # SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR
                self._take_descriptor(request, payload, fds)
            case 8 | 9 | 10 | 11:
                return self._about_ring(request, payload)
            case _:
                pass  # needs neither an answer nor anything done
        return None

    def _take_descriptor(self, request: int, payload: bytes, fds: list[int]) -> None:
        ring = self.rings[payload[0]]
        name = {12: "kick", 13: "call"}.get(request)
        if name is None:
            for fd in fds:
                os.close(fd)
            return
        if getattr(ring, name) >= 0:
            os.close(getattr(ring, name))
        setattr(ring, name, fds[0] if fds else -1)

    def _about_ring(self, request: int, payload: bytes) -> bytes | None:
        index, number = _STATE.unpack_from(payload)
        ring = self.rings[index]
        match request:
            case 8:  # SET_VRING_NUM
                ring.size = number
            case 9:  # SET_VRING_ADDR: descriptors, used, available
                ring.addresses = struct.unpack_from("<QQQ", payload, 8)
            case 10:  # SET_VRING_BASE
                ring.seen = number
            case _:  # GET_VRING_BASE, which stops the ring
                if ring.kick >= 0:
                    os.close(ring.kick)
                ring.kick = -1
                return _STATE.pack(index, ring.seen)
        return None


def wait_connected(backend: VhostUserNet, count: int = 1) -> None:
    wait_until(lambda: backend.connections >= count, "QEMU is connected", timeout_s=HOST_S)
