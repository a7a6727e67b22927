"""One stream: how it begins and ends from either side, and what credit allows."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cloudvmm.vsock.packet import Header, Operation
from cloudvmm.vsock.stream import BUFFER_BYTES, Stream

GUEST_CID = 3
ROOM = 4096
RECEIVING, SENDING, BOTH = 1, 2, 3


class Ends:
    """A stream, the host program's end of its socket, and the guest, which has taken the handshake."""

    def __init__(self, *, is_ours: bool = False, buffer_bytes: int = 65536) -> None:
        host, self.program = socket.socketpair()
        host.setblocking(False)
        self.program.setblocking(False)
        self.buffer_bytes = buffer_bytes
        self.forwarded = 0
        self.stream = Stream(host, guest_cid=GUEST_CID, host_port=99, guest_port=1024, is_ours=is_ours)
        self.stream.learn_credit(self.header(Operation.REQUEST))

    def header(self, operation: int, *, size: int = 0, flags: int = 0) -> Header:
        return Header(GUEST_CID, 2, 1024, 99, size, 1, operation, flags, self.buffer_bytes, self.forwarded)

    def guest(self, operation: int, payload: bytes = b"", *, flags: int = 0) -> None:
        self.stream.take(self.header(operation, size=len(payload), flags=flags), [memoryview(payload)])

    def look(self, *, readable: bool = True, writable: bool = True, hung_up: bool = False) -> None:
        self.stream.look(readable=readable, writable=writable, hung_up=hung_up)

    def said(self) -> list[tuple[Operation, bytes | int]]:
        """Return all that is said to the guest now: operations, with their payload or flags."""
        found: list[tuple[Operation, bytes | int]] = []
        while self.stream.has_news:
            room = memoryview(bytearray(ROOM))
            header = self.stream.next([room])
            if header is None:
                continue
            operation = Operation(header.operation)
            found.append((operation, bytes(room[: header.size]) if header.size else header.flags))
        return found

    def fill(self) -> int:
        """Send data until the host program's socket and the buffer are full; return its size."""
        total = 0
        while not self.stream._unsent:
            self.guest(Operation.DATA, bytes(ROOM))
            total += ROOM
        left = BUFFER_BYTES - len(self.stream._unsent)
        self.guest(Operation.DATA, bytes(left))
        return total + left

    def read_all(self) -> bytes:
        """Read, as the host program, until the socket is empty or at its end."""
        data = b""
        try:
            while piece := self.program.recv(1 << 20):
                data += piece
        except BlockingIOError:
            pass
        return data

    def close(self) -> None:
        self.stream.close()
        self.program.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    """A stream that the guest began, and that is open."""
    made = Ends()
    assert made.said() == [(Operation.RESPONSE, 0)]
    yield made
    made.close()


@pytest.fixture
def calling() -> Iterator[Ends]:
    """A stream that the host began, which the guest was asked for."""
    made = Ends(is_ours=True)
    assert made.said() == [(Operation.REQUEST, 0)]
    yield made
    made.close()


def test_bytes_go_both_ways(ends):
    ends.program.send(b"to the guest")
    ends.look()
    assert ends.said() == [(Operation.DATA, b"to the guest")]
    ends.guest(Operation.DATA, b"to the host")
    assert ends.program.recv(100) == b"to the host"


def test_host_is_told_its_port_when_the_guest_answers(calling):
    calling.program.send(b"early")
    calling.look()
    assert calling.said() == []
    calling.guest(Operation.RESPONSE)
    assert calling.program.recv(100) == b"OK 99\n"
    assert calling.said() == [(Operation.DATA, b"early")]


def test_port_that_nobody_listens_at_is_the_end(calling):
    calling.guest(Operation.RESET)
    assert calling.stream.is_finished


def test_host_that_leaves_before_the_answer_takes_its_question_back(calling):
    calling.program.close()
    calling.look(hung_up=True)
    assert calling.said() == [(Operation.RESET, 0)]
    assert calling.stream.is_finished


def test_guest_hears_nothing_of_a_host_that_leaves_before_it_was_asked():
    ends = Ends(is_ours=True)
    ends.program.close()
    ends.look(hung_up=True)
    assert ends.stream.is_finished
    assert ends.said() == []
    ends.close()


def test_host_that_sends_no_more_goes_on_receiving(ends):
    ends.program.send(b"last")
    ends.program.shutdown(socket.SHUT_WR)
    ends.look()
    assert ends.said() == [(Operation.DATA, b"last"), (Operation.SHUTDOWN, SENDING)]
    ends.guest(Operation.DATA, b"answer")
    assert ends.read_all() == b"answer"
    ends.guest(Operation.SHUTDOWN, flags=SENDING)
    assert ends.said() == [(Operation.RESET, 0)]
    assert ends.stream.is_finished


def test_guest_that_sends_no_more_goes_on_receiving(ends):
    ends.guest(Operation.DATA, b"question")
    ends.guest(Operation.SHUTDOWN, flags=SENDING)
    assert ends.program.recv(100) == b"question"
    assert ends.program.recv(100) == b""
    ends.program.send(b"answer")
    ends.look()
    assert ends.said() == [(Operation.DATA, b"answer")]
    ends.program.shutdown(socket.SHUT_WR)
    ends.look()
    assert ends.said()[-1] == (Operation.RESET, 0)


def test_guest_that_receives_no_more_stops_the_host_writing(ends):
    ends.guest(Operation.SHUTDOWN, flags=RECEIVING)
    with pytest.raises(BrokenPipeError):
        ends.program.send(b"x")
    ends.guest(Operation.DATA, b"still sending")
    assert ends.program.recv(100) == b"still sending"
    assert ends.said() == []


def test_guest_that_closes_is_answered_at_once_and_its_bytes_still_go_out(ends):
    size = ends.fill()
    ends.guest(Operation.SHUTDOWN, flags=BOTH)
    assert ends.said() == [(Operation.RESET, 0)]
    assert ends.stream.is_over
    assert not ends.stream.is_finished
    received = 0
    while not ends.stream.is_finished:
        received += len(ends.read_all())
        ends.look()
    received += len(ends.read_all())
    assert received == size
    assert ends.program.recv(1) == b""


def test_host_that_closes_ends_both_directions_behind_its_bytes(ends):
    ends.program.send(b"last")
    ends.program.close()
    ends.look(hung_up=True)
    assert ends.said() == [(Operation.DATA, b"last"), (Operation.SHUTDOWN, BOTH)]
    assert not ends.stream.is_over
    ends.guest(Operation.RESET)
    assert ends.stream.is_finished


def test_host_that_closes_without_reading_ends_both_directions(ends):
    ends.guest(Operation.DATA, b"never read")
    ends.program.close()
    ends.look(hung_up=True)
    assert ends.said() == [(Operation.SHUTDOWN, BOTH)]


def test_host_that_reads_no_more_is_told_to_the_guest_and_may_go_on_sending(ends):
    ends.program.shutdown(socket.SHUT_RD)
    ends.guest(Operation.DATA, b"for nobody")
    assert ends.said() == [(Operation.SHUTDOWN, RECEIVING)]
    ends.program.send(b"words")
    ends.look()
    assert ends.said() == [(Operation.DATA, b"words")]


def test_what_the_host_does_not_read_is_bounded_by_credit(ends):
    ends.fill()
    assert len(ends.stream._unsent) == BUFFER_BYTES
    ends.guest(Operation.DATA, b"x")
    assert ends.said() == [(Operation.RESET, 0)]
    assert ends.stream.is_finished


def test_guest_gets_its_credit_back_when_the_host_has_read(ends):
    size = ends.fill()
    ends.said()
    ends.guest(Operation.CREDIT_REQUEST)
    room = memoryview(bytearray(ROOM))
    full = ends.stream.next([room])
    assert (full.operation, full.buffer_size) == (Operation.CREDIT_UPDATE, BUFFER_BYTES)
    assert size - full.forwarded == BUFFER_BYTES
    while ends.stream._unsent:
        ends.read_all()
        ends.look()
    empty = ends.stream.next([room])
    assert (empty.operation, empty.forwarded) == (Operation.CREDIT_UPDATE, size)


def test_guest_is_sent_no_more_than_it_has_room_for():
    ends = Ends(buffer_bytes=6)
    ends.said()
    ends.program.send(b"0123456789")
    ends.look()
    assert ends.said() == [(Operation.DATA, b"012345"), (Operation.CREDIT_REQUEST, 0)]
    ends.guest(Operation.CREDIT_UPDATE)
    assert ends.said() == []  # it is asked once, however often it says that there is none
    ends.forwarded = 3
    ends.guest(Operation.CREDIT_UPDATE)
    assert ends.said() == [(Operation.DATA, b"678"), (Operation.CREDIT_REQUEST, 0)]
    ends.close()


@pytest.mark.parametrize("forwarded", [7, 0x80000000, 0xFFFFFFFF])
def test_guest_that_lies_about_what_it_forwarded_gets_no_more_than_its_buffer(forwarded):
    ends = Ends(buffer_bytes=100)
    ends.said()
    ends.forwarded = forwarded
    ends.guest(Operation.CREDIT_UPDATE)
    ends.program.send(bytes(1000))
    ends.look()
    assert sum(len(data) for operation, data in ends.said() if operation == Operation.DATA) <= 100
    ends.close()


@pytest.mark.parametrize("operation", [Operation.REQUEST, Operation.RESPONSE, 0, 8, 0xFFFF])
def test_packet_that_has_no_place_in_the_stream_resets_it(ends, operation):
    ends.guest(operation)
    assert ends.said() == [(Operation.RESET, 0)]
    assert ends.stream.is_finished


def test_data_before_the_answer_resets_the_stream(calling):
    calling.guest(Operation.DATA, b"too early")
    assert calling.said() == [(Operation.RESET, 0)]


def test_data_behind_the_end_resets_the_stream(ends):
    ends.guest(Operation.SHUTDOWN, flags=SENDING)
    ends.guest(Operation.DATA, b"more")
    assert ends.said() == [(Operation.RESET, 0)]
