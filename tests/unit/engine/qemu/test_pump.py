"""Frames and marks both ways between QEMU and a link, each end played by a socket."""

from __future__ import annotations

import socket
import struct

import pytest

from cloudvmm.engine.base import EngineError, LinkLost, MachineGone, StateError
from cloudvmm.engine.qemu.pump import Pump
from support.leak import Holdings

SOON_S = 10.0
END = struct.pack(">I", 0)
MARK = b"\xff" * 4


@pytest.fixture
def ends():
    """QEMU's end, a pump, and the other side's end of the link."""
    holdings = Holdings()
    near, qemu = socket.socketpair()
    link, other = socket.socketpair()
    for sock in (qemu, other):
        sock.settimeout(SOON_S)
    with link, qemu, other:
        pump = Pump(near, link.fileno(), has_marks=True, expects=False)
        yield qemu, pump, other
        pump.close()
    holdings.assert_nothing_added()


def frame(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece
        data += piece
    return data


def test_bytes_go_both_ways_until_both_have_ended(ends):
    qemu, pump, other = ends
    qemu.sendall(b"memory")
    assert read(other, 10) == frame(b"memory")
    other.sendall(frame(b"page")[:6])
    other.sendall(frame(b"page")[6:] + MARK)
    assert read(qemu, 4) == b"page"
    assert pump.wait_mark(timeout_s=SOON_S)
    pump.mark()
    assert read(other, 4) == MARK
    assert not pump.wait_end(timeout_s=0)

    other.sendall(END)
    qemu.close()

    assert read(other, 4) == END
    assert pump.wait_end(timeout_s=SOON_S)
    assert pump.carried_bytes == 10


def test_mark_comes_behind_what_qemu_wrote(ends):
    qemu, pump, other = ends
    qemu.sendall(b"state")
    pump.mark()

    assert read(other, 13) == frame(b"state") + MARK


@pytest.mark.parametrize(
    ("raw", "error"), [(b"", LinkLost), (b"\0\0", LinkLost), (b"\0\x20\0\0", StateError)]
)
def test_link_that_ends_or_says_what_it_must_not(ends, raw, error):
    _, pump, other = ends
    other.sendall(raw)
    if error is LinkLost:
        other.close()

    with pytest.raises(error):
        pump.wait_mark(timeout_s=SOON_S)
    with pytest.raises(error):
        pump.wait_end(timeout_s=SOON_S)


def test_qemu_is_told_in_the_place_of_an_other_side_that_is_gone(ends):
    qemu, pump, other = ends
    other.sendall(frame(b"whole") + frame(b"half")[:6])
    assert read(qemu, 5) == b"whole"
    other.close()
    qemu.sendall(b"more")
    with pytest.raises(LinkLost):
        pump.wait_mark(timeout_s=SOON_S)
    qemu.shutdown(socket.SHUT_WR)

    pump.play_receiver(b"last", check=lambda: None)

    assert read(qemu, 4) == b"last"


def test_qemu_that_dies_meanwhile_is_not_waited_for(ends):
    _, pump, _ = ends

    def check() -> None:
        raise MachineGone

    with pytest.raises(EngineError):
        pump.play_receiver(b"last", check=check)
