"""The whole back end under a driver in Python: streams from both sides, and guests that mean harm."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudvmm.vsock.device import Device
from cloudvmm.vsock.packet import HEADER, Header, Operation
from support.caller import dial, listening_at
from support.front_end import (
    BUFFERS_AT,
    GUEST_BASE,
    HAS_NEXT,
    RING_SIZE,
    WRITABLE,
    FrontEnd,
)
from support.leak import Holdings

CID = 9
SLOT_BYTES = 8192
TO_GUEST, FROM_GUEST = 0, 1
FIRST_PORT = 1 << 30
WAIT_S = 10.0
BUFFER_BYTES = 1 << 18


class Guest:
    """A guest whose driver is this test, and the back end that serves it in a thread."""

    def __init__(self, folder: Path, *, limit: int = 1023) -> None:
        self.path = folder / "vsock"
        near, far = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(128)
        self.device = Device(far, listener, cid=CID, path=str(self.path), limit=limit)
        self.front = FrontEnd(near)
        self.receiving, self.sending = self.front.rings[TO_GUEST], self.front.rings[FROM_GUEST]
        self._next_send = 0
        self._thread = threading.Thread(target=self.device.run)
        self._thread.start()
        self.front.negotiate()
        self.front.share_memory()
        self.start()

    def start(self, *, bases: tuple[int, int] = (0, 0)) -> None:
        self.front.start(bases=bases)

    def offer_buffers(self, count: int = RING_SIZE) -> None:
        """Let the back end have empty buffers, each in a slot of its own."""
        for index in range(count):
            self.receiving.describe(index, GUEST_BASE + BUFFERS_AT + SLOT_BYTES * index, SLOT_BYTES, WRITABLE)
            self.receiving.offer(index)

    def received(self, *, timeout_s: float = WAIT_S) -> tuple[Header, bytes] | None:
        """Return the next packet for the guest, and offer its buffer again; None where none comes in time."""
        found = self.receiving.returned(timeout_s=timeout_s)
        if found is None:
            return None
        head, size = found
        data = os.pread(self.front.memory_fd, size, BUFFERS_AT + SLOT_BYTES * head)
        self.receiving.offer(head)
        header = Header._make(HEADER.unpack_from(data))
        assert len(data) == HEADER.size + header.size
        return header, data[HEADER.size :]

    def expect(self, operation: Operation) -> tuple[Header, bytes]:
        """Return the next packet for the guest, news of credit passed over, which must be of this kind."""
        found = self.received()
        while found is not None and found[0].operation == Operation.CREDIT_UPDATE:
            found = self.received()
        assert found is not None
        assert found[0].operation == operation
        return found

    def send(
        self, operation: int, payload: bytes = b"", *, host_port: int, guest_port: int, **changes
    ) -> None:
        header = Header(
            CID, 2, guest_port, host_port, len(payload), 1, operation, 0, BUFFER_BYTES, 0
        )._replace(**changes)
        self.send_raw(HEADER.pack(*header), payload)

    def send_raw(self, header: bytes, payload: bytes = b"") -> None:
        """Send a packet in two descriptors, and wait until its buffer has come back."""
        index = self._next_send = (self._next_send + 2) % RING_SIZE
        at = BUFFERS_AT + (RING_SIZE + index) * SLOT_BYTES
        os.pwrite(self.front.memory_fd, header, at)
        os.pwrite(self.front.memory_fd, payload, at + 64)
        self.sending.describe(index, GUEST_BASE + at, len(header), HAS_NEXT, index + 1)
        self.sending.describe(index + 1, GUEST_BASE + at + 64, len(payload))
        self.sending.offer(index)
        assert self.sending.returned() == (index, 0)

    def is_alive(self) -> bool:
        """Return whether the back end still answers its front end."""
        self.front.settle()
        return self._thread.is_alive()

    def close(self) -> None:
        self.front.close()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self.device.close()
        self.path.unlink()


@contextlib.contextmanager
def guest_in(folder: Path, **options) -> Iterator[Guest]:
    made = Guest(folder, **options)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    before = Holdings()
    with guest_in(tmp_path) as made:
        made.offer_buffers()
        yield made
    before.assert_nothing_added()


def answer(guest: Guest) -> int:
    """Take the host's question for a stream, as a listening program; return the host's port."""
    header, _ = guest.expect(Operation.REQUEST)
    guest.send(Operation.RESPONSE, host_port=header.source_port, guest_port=header.target_port)
    return header.source_port


def call_out(
    guest: Guest, listener: socket.socket, *, guest_port: int = 5000, port: int = 70
) -> socket.socket:
    """Begin a stream from the guest; return the host program's end."""
    guest.send(Operation.REQUEST, host_port=port, guest_port=guest_port)
    guest.expect(Operation.RESPONSE)
    return listener.accept()[0]


def test_host_reaches_a_port_of_the_guest(guest):
    result: list[tuple[socket.socket, bytes]] = []
    thread = threading.Thread(target=lambda: result.append(dial(guest.path, 1234)))
    thread.start()
    port = answer(guest)
    thread.join(WAIT_S)
    connection, line = result[0]
    with connection:
        assert (port, line) == (FIRST_PORT, b"OK 1073741824\n")
        connection.sendall(b"to the guest")
        assert guest.expect(Operation.DATA)[1] == b"to the guest"
        guest.send(Operation.DATA, b"to the host", host_port=port, guest_port=1234)
        assert connection.recv(100) == b"to the host"


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n", b"CONNECT\n", b"CONNECT \n", b"CONNECT x\n", b"CONNECT -1\n",
        b"CONNECT 4294967296\n", b"CONNECT 1 2\n", b"CONNECT " + b"1" * 40, b"\n", b"CONNECT \xff\n",
        b"CONNEC",
    ],
)  # fmt: skip
def test_program_that_says_something_else_is_let_go(guest, words):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_S)
        connection.connect(str(guest.path))
        connection.sendall(words)
        connection.shutdown(socket.SHUT_WR)
        assert ended(connection)


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it had sent more than was read
        return True


@pytest.mark.parametrize("words", [b"connect 1234\n", b"Connect   1234 \r\n", b"CONNECT +1234\n"])
def test_word_for_a_port_may_be_written_in_other_ways(guest, words):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(guest.path))
        for index in range(len(words)):
            connection.sendall(words[index : index + 1])
        assert guest.expect(Operation.REQUEST)[0].target_port == 1234


def test_port_that_nobody_listens_at_is_the_end(guest):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_S)
        connection.connect(str(guest.path))
        connection.sendall(b"CONNECT 1\n")
        header, _ = guest.expect(Operation.REQUEST)
        guest.send(Operation.RESET, host_port=header.source_port, guest_port=1)
        assert connection.recv(1) == b""


def test_guest_reaches_a_program_of_the_host(guest):
    with listening_at(guest.path, 70) as listener, call_out(guest, listener) as connection:
        guest.send(Operation.DATA, b"to the host", host_port=70, guest_port=5000)
        assert connection.recv(100) == b"to the host"
        connection.sendall(b"to the guest")
        assert guest.expect(Operation.DATA)[1] == b"to the guest"


def test_port_without_a_program_is_reset(guest):
    guest.send(Operation.REQUEST, host_port=71, guest_port=5000)
    assert guest.expect(Operation.RESET)[0].target_port == 5000


def test_socket_file_that_nobody_serves_is_reset(guest):
    with listening_at(guest.path, 71):
        os.rename(f"{guest.path}_71", f"{guest.path}_72")
        Path(f"{guest.path}_71").touch()
    os.rename(f"{guest.path}_72", f"{guest.path}_71")
    guest.send(Operation.REQUEST, host_port=71, guest_port=5000)
    guest.expect(Operation.RESET)


def test_program_with_a_full_queue_is_waited_for(guest):
    with listening_at(guest.path, 70, backlog=0) as listener, socket.socket(socket.AF_UNIX) as first:
        first.connect(f"{guest.path}_70")
        guest.send(Operation.REQUEST, host_port=70, guest_port=5000)
        assert guest.received(timeout_s=0.1) is None
        listener.accept()[0].close()
        guest.expect(Operation.RESPONSE)
        listener.accept()[0].close()


def test_nothing_is_read_from_the_host_while_the_guest_takes_nothing(tmp_path):
    with guest_in(tmp_path) as guest:
        guest.offer_buffers(2)
        with listening_at(guest.path, 70) as listener:
            guest.send(Operation.REQUEST, host_port=70, guest_port=5000)
            with listener.accept()[0] as connection:
                connection.setblocking(False)
                sent = 0
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent += connection.send(bytes(4096))
                assert sent < 1 << 20
                assert guest.is_alive()
                received = 0
                while received < sent:
                    received += len(guest.received()[1])
                assert received == sent


def test_host_that_reads_nothing_stops_only_its_own_stream(guest):
    with listening_at(guest.path, 70) as listener, call_out(guest, listener) as slow:
        assert slow
        for _ in range(40):
            guest.send(Operation.DATA, bytes(8000), host_port=70, guest_port=5000)
        with call_out(guest, listener, guest_port=5001) as quick:
            guest.send(Operation.DATA, b"past it", host_port=70, guest_port=5001)
            assert quick.recv(100) == b"past it"


def test_streams_go_on_after_a_pause(guest):
    with listening_at(guest.path, 70) as listener, call_out(guest, listener) as connection:
        bases = guest.front.stop()
        connection.sendall(b"while it stood still")
        guest.start(bases=(bases[0], bases[1]))
        assert guest.expect(Operation.DATA)[1] == b"while it stood still"


def test_host_that_calls_while_the_guest_stands_still_waits(guest):
    bases = guest.front.stop()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(guest.path))
        connection.sendall(b"CONNECT 80\n")
        guest.front.settle()
        guest.start(bases=(bases[0], bases[1]))
        assert guest.expect(Operation.REQUEST)[0].target_port == 80


def test_driver_that_begins_anew_knows_no_stream(guest):
    with listening_at(guest.path, 70) as listener, call_out(guest, listener) as connection:
        connection.settimeout(WAIT_S)
        guest.front.stop()
        for ring in guest.front.rings:
            ring.forget()
        guest.start()
        assert connection.recv(1) == b""
        guest.offer_buffers()
        call_out(guest, listener).close()


def test_guest_that_asks_twice_has_its_stream_reset(guest):
    with listening_at(guest.path, 70) as listener, call_out(guest, listener) as connection:
        connection.settimeout(WAIT_S)
        guest.send(Operation.REQUEST, host_port=70, guest_port=5000)
        guest.expect(Operation.RESET)
        assert connection.recv(1) == b""


@pytest.mark.parametrize("changes", [{"source_cid": CID + 1}, {"target_cid": 1}, {"target_cid": 77}])
def test_packet_of_another_cid_is_passed_over(guest, changes):
    guest.send(Operation.REQUEST, host_port=70, guest_port=5000, **changes)
    guest.send(Operation.DATA, b"x", host_port=70, guest_port=5001)
    assert guest.expect(Operation.RESET)[0].target_port == 5001


def test_packet_of_no_stream_socket_is_reset_and_resets_are_not_answered(guest):
    guest.send(Operation.REQUEST, host_port=70, guest_port=5000, kind=2)
    guest.expect(Operation.RESET)
    guest.send(Operation.RESET, host_port=70, guest_port=5000, kind=2)
    guest.send(Operation.RESET, host_port=70, guest_port=5000)
    assert guest.received(timeout_s=0.1) is None


def test_resets_that_the_guest_does_not_take_hold_its_packets_up(tmp_path):
    with guest_in(tmp_path) as guest:
        for port in range(256):
            guest.send(Operation.DATA, b"x", host_port=port, guest_port=6000)
        with pytest.raises(AssertionError):
            guest.sending.returned = lambda timeout_s=0.1: None
            guest.send(Operation.DATA, b"x", host_port=256, guest_port=6000)
        assert guest.is_alive()
        guest.offer_buffers()
        ports = [guest.expect(Operation.RESET)[0].source_port for _ in range(257)]
        assert ports == list(range(257))


def test_streams_beyond_the_limit_are_refused(tmp_path):
    with guest_in(tmp_path, limit=2) as guest:
        guest.offer_buffers()
        with listening_at(guest.path, 70) as listener, contextlib.ExitStack() as undo:
            for port in (5000, 5001):
                undo.enter_context(call_out(guest, listener, guest_port=port))
            guest.send(Operation.REQUEST, host_port=70, guest_port=5002)
            guest.expect(Operation.RESET)
            connection, line = dial(guest.path, 80)
            undo.enter_context(connection)
            assert line == b""


@pytest.mark.parametrize(
    ("head", "descriptors"),
    [
        (0, [(0, 44, HAS_NEXT, 0)]),
        (0, [(1 << 40, 44, 0, 0)]),
        (RING_SIZE, []),
        (0, [(0, 44, WRITABLE, 0)]),
        (0, [(0, 0, 0, 0)]),
        (0, [(0, 10, 0, 0)]),
    ],
    ids=["loop", "outside", "head", "writable", "empty", "short"],
)
def test_sender_that_lies_about_its_buffers_stops_nobody_else(guest, head, descriptors, tmp_path):
    for index, (offset, *rest) in enumerate(descriptors):
        guest.sending.describe(index, GUEST_BASE + offset, *rest)
    guest.sending.offer(head)
    assert guest.is_alive()
    guest.front.stop()
    for ring in guest.front.rings:
        ring.forget()
    guest.start()
    guest.offer_buffers()
    with listening_at(guest.path, 70) as listener:
        call_out(guest, listener).close()


def test_guest_that_has_filled_the_log_stops_nobody(guest, monkeypatch):
    log = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(log, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with os.fdopen(os.dup(log), "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        guest.sending.offer(RING_SIZE)
        assert guest.is_alive()
        with contextlib.suppress(OSError):
            full.close()
    os.close(log)


@pytest.mark.parametrize("size", [0, 1, 43, 44])
def test_buffers_without_room_stop_their_driver_alone(tmp_path, size):
    with guest_in(tmp_path) as guest:
        guest.receiving.describe(0, GUEST_BASE + BUFFERS_AT, size, WRITABLE)
        guest.receiving.offer(0)
        guest.send(Operation.DATA, b"x", host_port=1, guest_port=2)
        assert guest.receiving.returned(timeout_s=0.1) is None
        assert guest.is_alive()


NUMBER = st.integers(0, 3) | st.integers(0, 2**32 - 1)
PACKET = st.builds(
    Header,
    st.sampled_from([CID, CID, CID, 0, 2**64 - 1]),
    st.sampled_from([2, 2, 2, 3]),
    st.integers(1, 3),
    st.sampled_from([70, 70, 71, FIRST_PORT]),
    NUMBER,
    st.sampled_from([1, 1, 1, 1, 2, 0]),
    st.integers(0, 9) | st.integers(0, 0xFFFF),
    st.integers(0, 4),
    NUMBER,
    NUMBER,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(PACKET, max_size=40))
def test_no_packet_stops_the_back_end(tmp_path, packets):
    with guest_in(tmp_path) as guest, listening_at(guest.path, 70):
        guest.offer_buffers()
        for header in packets:
            guest.send_raw(HEADER.pack(*header), bytes(min(header.size, 4096)))
            while select.select([guest.receiving.call_fd], [], [], 0)[0]:
                guest.received(timeout_s=0)
        assert guest.is_alive()


def test_config_space_holds_the_cid(guest):
    content = struct.pack("=III", 0, 8, 0)
    assert guest.front.ask(24, content + bytes(8)) == content + struct.pack("<Q", CID)
