"""Fuzz our own vhost-user back end: what its front end says, what is in the guest's rings, what packets hold.

What must hold: the front end is served until it leaves or ProtocolBroken; a ring gives buffers that lie in
the guest's memory until RingBroken, never more than it has entries at a time; a packet changes nothing but
streams, whose unsent bytes stay below what they have credit for; each packet to the guest fits its buffer.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import tempfile
from collections.abc import Hashable
from pathlib import Path

from cloudvmm.vhost.error import ProtocolBroken, RingBroken
from cloudvmm.vhost.memory import Memory, Place
from cloudvmm.vhost.message import Kind
from cloudvmm.vhost.ring import Ring
from cloudvmm.vhost.session import Session
from cloudvmm.vsock.caller import Caller, NoPort
from cloudvmm.vsock.muxer import Muxer
from cloudvmm.vsock.packet import HEADER, HOST_CID, STREAM, Header, Operation, read_packet
from cloudvmm.vsock.stream import BUFFER_BYTES
from named import cut, fed, named_target
from runner import main

MEMORY_BYTES = 1 << 16
GUEST_BASE = 1 << 30
USER_BASE = 0x7F00_0000_0000
RING_SIZE = 16
AVAILABLE_AT, USED_AT = 0x1000, 0x2000
MOST_TAKEN = 64
CID = 3
PORTS = (1, 2)  # of the host, where somebody listens
QUEUE = 2

_HOME = tempfile.TemporaryDirectory(prefix="fuzz-")
_PATH = str(Path(_HOME.name) / "vsock")
_memory_fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
os.ftruncate(_memory_fd, MEMORY_BYTES)


def _front_end(raw: bytes) -> Hashable:
    """Messages; the first of each piece comes with the memory's descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    near, far = socket.socketpair()
    session = Session(far, rings=2, config=bytes(8))
    far.settimeout(60)
    served = 0
    with near, contextlib.closing(session):
        near.setblocking(False)
        for number, piece in enumerate(cut(raw)):
            with contextlib.suppress(BlockingIOError):
                if piece:
                    socket.send_fds(near, [piece], [_memory_fd] if number % 2 == 0 else [])
        near.shutdown(socket.SHUT_WR)
        outcome = "left"
        try:
            while session.serve():
                served += 1
                with contextlib.suppress(BlockingIOError):
                    near.recv(1 << 16)  # what is answered
        except ProtocolBroken as error:
            outcome = "".join(word for word in str(error) if not word.isdigit())[:24]
        is_running = [ring.is_running for ring in session.rings]
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left"
    return outcome, min(served, 8), *is_running


def _ring(raw: bytes) -> Hashable:
    """What is written to the guest's memory: descriptors, then what is offered."""
    os.pwrite(_memory_fd, bytes(MEMORY_BYTES), 0)
    os.pwrite(_memory_fd, raw[: 16 * RING_SIZE], 0)
    os.pwrite(_memory_fd, raw[16 * RING_SIZE :][: 4 + 2 * RING_SIZE], AVAILABLE_AT)
    memory, ring = Memory(), Ring()
    taken = 0
    try:
        memory.add(Place(GUEST_BASE, MEMORY_BYTES, USER_BASE, 0), _memory_fd)
        ring.set_size(RING_SIZE)
        ring.set_addresses(USER_BASE, USER_BASE + USED_AT, USER_BASE + AVAILABLE_AT)
        ring.attach(memory)
        while taken < MOST_TAKEN and (chain := ring.take()) is not None:
            pieces = [*chain.readable, *chain.writable]
            assert len(pieces) <= RING_SIZE
            assert sum(map(len, pieces)) <= RING_SIZE * MEMORY_BYTES
            packet = read_packet(chain.readable)
            if packet is not None:
                assert sum(map(len, packet[1])) == packet[0].size
            ring.give(chain, 0)
            taken += 1
            del pieces, packet, chain
        assert taken <= RING_SIZE, "more than it can offer at a time"
        return taken
    except RingBroken as error:
        return taken, "".join(word for word in str(error) if not word.isdigit())[:24]
    finally:
        ring.stop()
        memory.close()


def _packets(raw: bytes) -> Hashable:
    """Packets of the guest, one after the other, and what comes back."""
    said: list[Hashable] = []
    with contextlib.ExitStack() as stack:
        poller = stack.enter_context(select.epoll())
        listeners = [stack.enter_context(_listening(port)) for port in ("", *(f"_{port}" for port in PORTS))]
        muxer = Muxer(poller, listeners[0], cid=CID, path=_PATH, limit=8)
        stack.callback(muxer.close)
        muxer.start()
        left = memoryview(raw)
        while left:
            found = read_packet([left])
            if found is None:
                break
            header, payload = found
            # What is cut off never came; a guest that says that it is another is passed over.
            muxer.take(header._replace(source_cid=CID, target_cid=HOST_CID), payload)
            left = left[HEADER.size + header.size :]
            muxer.handle(poller.poll(0))
            if muxer.retries:
                muxer.retry()
            for stream in list(muxer._streams.values()):
                assert len(stream._unsent) <= BUFFER_BYTES
            said += _drained(muxer)
        muxer.clear()
        assert not muxer._streams and not muxer._wanted
    return tuple(said[:6]), bool(left)


def _drained(muxer: Muxer) -> list[Hashable]:
    said: list[Hashable] = []
    buffer = memoryview(bytearray(4096))
    while muxer.has_news and len(said) < 64:
        size = muxer.next_packet([buffer[:30], buffer[30:]])
        if not size:
            break
        assert size <= len(buffer)
        header = Header._make(HEADER.unpack_from(buffer))
        assert header.size == size - HEADER.size
        assert header.target_cid == CID
        said.append(Operation(header.operation).name)
    return said


@contextlib.contextmanager
def _listening(suffix: str) -> object:
    path = _PATH + suffix
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        try:
            listener.listen(QUEUE)
            yield listener
        finally:
            os.unlink(path)


def _caller(raw: bytes) -> Hashable:
    """What a program of the host says first."""
    with fed(raw) as near:
        near.setblocking(False)
        try:
            port = Caller(near).read_port(has_ended=True)
        except NoPort:
            return "no port"
        assert port is not None and 0 <= port < 2**32
        rest = raw.partition(b"\n")[2]
        with contextlib.suppress(BlockingIOError):
            assert near.recv(len(rest) + 1) == rest, "what is behind the line was taken"
        return "port"


def _packet(operation: int, *, host: int = 1, guest: int = 5, size: int = 0, flags: int = 0) -> bytes:
    header = HEADER.pack(CID, HOST_CID, guest, host, size, STREAM, operation, flags, 1 << 16, 0)
    return header + b"x" * size


TARGET = named_target(
    "vsock_guest",
    {"front-end": _front_end, "ring": _ring, "packets": _packets, "caller": _caller},
    words=(
        *(_packet(operation) for operation in Operation),
        *(_packet(operation, host=2, guest=6, size=64, flags=3) for operation in Operation),
        *(struct.pack("=IIIQ", kind, 1, 8, 0) for kind in Kind),
        *(struct.pack("<QIHH", GUEST_BASE + 0x4000, 64, 1, 1), struct.pack("<QIHH", GUEST_BASE, 44, 2, 0)),
        *(b"CONNECT ", b"4294967295\n", b"4294967296\n", b"connect +"),
    ),
    share=0.05,
)

if __name__ == "__main__":
    main(TARGET)
