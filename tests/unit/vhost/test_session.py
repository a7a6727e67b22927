"""What a front end can ask of a back end, and what ends the connection."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from cloudvmm.vhost.error import MemoryUnknown, ProtocolBroken
from cloudvmm.vhost.message import Kind
from cloudvmm.vhost.session import PROTOCOL_FEATURES, VERSION_1, Session
from support.deadline import HOST_S
from support.front_end import GUEST_BASE, MEMORY_BYTES, RING_SIZE, USER_BASE, FrontEnd
from support.leak import Holdings

NEEDS_REPLY = 1 | 8


class Served:
    """A session that a thread serves until it ends, and how it ended."""

    def __init__(self) -> None:
        near, far = socket.socketpair()
        self.session = Session(far, rings=2, config=b"configuration")
        self.front = FrontEnd(near)
        self.error: ProtocolBroken | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while self.session.serve():
                pass
        except ProtocolBroken as error:
            self.error = error

    def end(self) -> ProtocolBroken | None:
        """Return how it ended, having left."""
        self.front.connection.shutdown(socket.SHUT_WR)
        self._thread.join(HOST_S)
        assert not self._thread.is_alive()
        return self.error

    def close(self) -> None:
        self.end()
        self.session.close()
        self.front.close()


@pytest.fixture
def served() -> Iterator[Served]:
    before = Holdings()
    made = Served()
    yield made
    made.close()
    before.assert_nothing_added()


def test_features_are_offered_and_the_rings_start_where_they_are_told(served):
    front = served.front
    assert front.ask_u64(Kind.GET_FEATURES) == VERSION_1 | PROTOCOL_FEATURES
    front.negotiate()
    front.send(Kind.SET_OWNER)
    front.share_memory()
    front.start(bases=(5, 9))
    assert [ring.is_running for ring in served.session.rings] == [True, True]
    assert front.stop() == [5, 9]
    assert [ring.is_running for ring in served.session.rings] == [False, False]


def test_ring_runs_only_while_it_is_enabled(served):
    front = served.front
    front.negotiate()
    front.share_memory()
    front.start()
    front.send(Kind.SET_VRING_ENABLE, struct.pack("=II", 1, 0))
    front.settle()
    assert [ring.is_running for ring in served.session.rings] == [True, False]


def test_without_protocol_features_rings_are_enabled_from_the_start(served):
    served.front.send(Kind.SET_FEATURES, struct.pack("=Q", VERSION_1))
    served.front.settle()
    assert all(ring.is_enabled for ring in served.session.rings)


@pytest.mark.parametrize(
    ("offset", "size", "found"),
    [(0, 6, b"config"), (6, 7, b"uration"), (10, 8, b"ion\0\0\0\0\0"), (500, 2, b"\0\0")],
)
def test_configuration_is_read_in_parts(served, offset, size, found):
    content = struct.pack("=III", offset, size, 0)
    answer = served.front.ask(Kind.GET_CONFIG, content + bytes(size))
    assert answer == content + found


def test_message_that_wants_an_answer_gets_one(served):
    front = served.front
    front.negotiate()
    assert front.ask_u64(Kind.SET_VRING_NUM, struct.pack("=II", 0, 16), flags=NEEDS_REPLY) == 0
    assert front.ask_u64(Kind.GET_QUEUE_NUM, flags=NEEDS_REPLY) == 2


def test_memory_comes_and_goes_by_regions_under_running_rings(served):
    front = served.front
    front.negotiate()
    front.share_memory()
    front.start()
    assert front.ask_u64(Kind.GET_MAX_MEM_SLOTS) > 8
    more = struct.pack("=5Q", 0, GUEST_BASE + MEMORY_BYTES, 4096, USER_BASE + MEMORY_BYTES, 0)
    front.send(Kind.ADD_MEM_REG, more, fds=[front.memory_fd])
    front.send(Kind.REM_MEM_REG, more)
    front.settle()
    assert all(ring.is_running for ring in served.session.rings)


def test_ring_stands_still_while_its_region_is_away(served):
    front = served.front
    front.negotiate()
    front.share_memory()
    front.start()
    region = struct.pack("=5Q", 0, GUEST_BASE, MEMORY_BYTES, USER_BASE, 0)
    front.send(Kind.REM_MEM_REG, region)
    front.settle()
    assert not any(ring.is_running for ring in served.session.rings)
    front.send(Kind.ADD_MEM_REG, region, fds=[front.memory_fd])
    front.settle()
    assert all(ring.is_running for ring in served.session.rings)


def test_region_that_may_only_be_read_is_out_of_reach_and_no_error(served, tmp_path):
    (tmp_path / "rom").write_bytes(bytes(4096))
    with (tmp_path / "rom").open("rb") as rom:
        region = struct.pack("=5Q", 0, GUEST_BASE, 4096, USER_BASE, 0)
        served.front.send(Kind.ADD_MEM_REG, region, fds=[rom.fileno()])
        served.front.settle()
        with pytest.raises(MemoryUnknown):
            served.session._memory.pieces(GUEST_BASE, 1)
        served.front.send(Kind.REM_MEM_REG, region)
        served.front.settle()


def test_front_end_that_leaves_is_no_error(served):
    assert served.end() is None


def table(*places: tuple[int, int, int, int]) -> bytes:
    return struct.pack("=II", len(places), 0) + b"".join(struct.pack("=4Q", *place) for place in places)


REGION = (GUEST_BASE, MEMORY_BYTES, USER_BASE, 0)
BROKEN = {
    "no-such-kind": (99, b"", 0, "Message 99 is not among"),
    "postcopy": (28, b"", 0, "Message 28 is not among"),
    "too-short": (Kind.SET_VRING_NUM, b"1", 0, "too short"),
    "no-such-ring": (Kind.SET_VRING_NUM, struct.pack("=II", 2, 16), 0, "no ring 2"),
    "size-of-no-ring": (Kind.SET_VRING_NUM, struct.pack("=II", 0, 5), 0, "cannot have 5 entries"),
    "features": (Kind.SET_FEATURES, struct.pack("=Q", 1 << 29), 0, "not offered"),
    "kick-without-fd": (Kind.SET_VRING_KICK, struct.pack("=Q", 0), 0, "announced and missing"),
    "fd-that-is-denied": (Kind.SET_VRING_CALL, struct.pack("=Q", 1 << 8), 1, "announced and missing"),
    "many-regions": (Kind.SET_MEM_TABLE, struct.pack("=II", 9, 0), 0, "table of 9"),
    "regions-missing": (Kind.SET_MEM_TABLE, struct.pack("=II", 2, 0), 1, "table of 2"),
    "fewer-fds": (Kind.SET_MEM_TABLE, table(REGION, REGION), 1, "come with 1 descriptors"),
    "region-too-large": (Kind.SET_MEM_TABLE, table((0, 2 * MEMORY_BYTES, 0, 0)), 1, "larger than its file"),
    "region-behind": (Kind.SET_MEM_TABLE, table((0, 4096, 0, MEMORY_BYTES)), 1, "larger than its file"),
    "region-of-nothing": (Kind.SET_MEM_TABLE, table((0, 0, 0, 0)), 1, "larger than its file"),
    "regions-across": (Kind.SET_MEM_TABLE, table(REGION, REGION), 2, "across each other"),
    "region-without-fd": (Kind.ADD_MEM_REG, struct.pack("=5Q", 0, *REGION), 0, "without a descriptor"),
    "no-region-to-remove": (Kind.REM_MEM_REG, struct.pack("=5Q", 0, *REGION), 0, "no such memory region"),
    "ring-outside": (Kind.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, 1, 2, 3, 4), 0, "not in the guest's"),
}


@pytest.mark.parametrize(("kind", "content", "fds", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_front_end_that_breaks_the_protocol_is_told_from_one_that_leaves(served, kind, content, fds, words):
    front = served.front
    front.send(Kind.SET_VRING_NUM, struct.pack("=II", 0, RING_SIZE))
    front.send(kind, content, fds=[front.memory_fd] * fds)
    assert words in str(served.end())


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("=III", 1, 1, 1 << 30),
        struct.pack("=III", 1, 2, 0),
        b"\1\2\3",
        struct.pack("=III", Kind.SET_FEATURES, 1, 8) + b"1234",
        bytes(range(256)),
    ],
    ids=["large", "version", "short-header", "short-content", "noise"],
)
def test_bytes_that_are_no_message_end_it(served, data):
    served.front.connection.sendall(data)
    assert isinstance(served.end(), ProtocolBroken)


def test_descriptors_that_cannot_be_mapped_end_it(served):
    reading, writing = os.pipe()
    try:
        served.front.send(Kind.SET_MEM_TABLE, table(REGION), fds=[reading])
        assert "cannot be mapped" in str(served.end())
    finally:
        os.close(reading)
        os.close(writing)
