"""A ring under a driver that keeps to the rules, and under drivers that do not."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudvmm.vhost.error import RingBroken
from cloudvmm.vhost.memory import Memory, Place
from cloudvmm.vhost.ring import Ring
from support.front_end import (
    BUFFERS_AT,
    GUEST_BASE,
    HAS_NEXT,
    MEMORY_BYTES,
    RING_SIZE,
    USER_BASE,
    WRITABLE,
    GuestRing,
)

SECOND_BASE = GUEST_BASE + MEMORY_BYTES
INDIRECT = 4


@contextlib.contextmanager
def connected() -> Iterator[tuple[Ring, GuestRing, int]]:
    """Yield a ring, its driver, and the memory of both: two regions side by side, in one file."""
    memory_fd = os.memfd_create("ring", os.MFD_CLOEXEC)
    os.ftruncate(memory_fd, 2 * MEMORY_BYTES)
    memory = Memory()
    memory.replace(
        [
            Place(GUEST_BASE, MEMORY_BYTES, USER_BASE, 0),
            Place(SECOND_BASE, MEMORY_BYTES, USER_BASE + 4 * MEMORY_BYTES, MEMORY_BYTES),
        ],
        [memory_fd, memory_fd],
    )
    guest = GuestRing(memory_fd, 0)
    ring = Ring()
    try:
        ring.set_size(RING_SIZE)
        ring.set_addresses(USER_BASE, USER_BASE + 0x2000, USER_BASE + 0x1000)
        ring.attach(memory)
        ring.set_call(os.dup(guest.call_fd))
        yield ring, guest, memory_fd
    finally:
        ring.stop()
        memory.close()
        guest.close()
        os.close(memory_fd)


@pytest.fixture
def both() -> Iterator[tuple[Ring, GuestRing, int]]:
    with connected() as found:
        yield found


def test_chain_has_its_pieces_in_order_and_goes_back(both):
    ring, guest, memory_fd = both
    os.pwrite(memory_fd, b"readable", BUFFERS_AT)
    guest.describe(3, GUEST_BASE + BUFFERS_AT, 4, HAS_NEXT, 5)
    guest.describe(5, GUEST_BASE + BUFFERS_AT + 4, 4, HAS_NEXT, 1)
    guest.describe(1, GUEST_BASE + BUFFERS_AT + 64, 16, WRITABLE)
    guest.offer(3, kick=False)

    chain = ring.take()

    assert [bytes(piece) for piece in chain.readable] == [b"read", b"able"]
    assert [len(piece) for piece in chain.writable] == [16]
    chain.writable[0][:3] = b"yes"
    ring.give(chain, 3)
    ring.notify()
    assert guest.returned() == (3, 3)
    assert os.pread(memory_fd, 3, BUFFERS_AT + 64) == b"yes"
    assert ring.take() is None


def test_buffer_across_two_regions_has_a_piece_of_each(both):
    ring, guest, _ = both
    guest.describe(0, SECOND_BASE - 10, 30)
    guest.offer(0, kick=False)
    assert [len(piece) for piece in ring.take().readable] == [10, 20]


def test_buffer_of_no_size_has_no_piece_wherever_it_is(both):
    ring, guest, _ = both
    guest.describe(0, GUEST_BASE, 0, HAS_NEXT, 1)
    guest.describe(1, 0, 0, WRITABLE)
    guest.offer(0, kick=False)
    chain = ring.take()
    assert (chain.readable, chain.writable) == ([], [])


def test_buffer_that_is_put_back_is_taken_again(both):
    ring, guest, _ = both
    guest.describe(2, GUEST_BASE + BUFFERS_AT, 1)
    guest.offer(2, kick=False)
    assert ring.take().head == 2
    ring.put_back()
    assert ring.take().head == 2


def test_indices_go_round(both):
    ring, guest, _ = both
    guest.describe(0, GUEST_BASE + BUFFERS_AT, 1)
    for _ in range(70_000 // 7):
        for _ in range(7):
            guest.offer(0, kick=False)
        for _ in range(7):
            ring.give(ring.take(), 0)
    assert ring.next_index == 70_000 & 0xFFFF
    assert ring.take() is None


def test_driver_that_wants_no_interrupt_gets_none(both):
    ring, guest, memory_fd = both
    guest.describe(0, GUEST_BASE + BUFFERS_AT, 1)
    guest.offer(0, kick=False)
    os.pwrite(memory_fd, struct.pack("<H", 1), 0x1000)
    ring.give(ring.take(), 0)
    ring.notify()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(guest.call_fd)


def test_unmuted_ring_tells_what_was_offered_meanwhile(both):
    ring, guest, memory_fd = both
    ring.mute()
    assert os.pread(memory_fd, 2, 0x2000) == b"\1\0"
    guest.describe(0, GUEST_BASE + BUFFERS_AT, 1)
    assert not ring.unmute()
    guest.offer(0, kick=False)
    assert ring.unmute()
    assert os.pread(memory_fd, 2, 0x2000) == b"\0\0"


@pytest.mark.parametrize(
    ("descriptors", "words"),
    [
        ([(0, 1, HAS_NEXT, 0)], "does not end"),
        ([(0, 1, HAS_NEXT, 1), (0, 1, HAS_NEXT, 0)], "does not end"),
        ([(0, 1, HAS_NEXT, RING_SIZE)], "outside a ring"),
        ([(0, 1, HAS_NEXT, 0xFFFF)], "outside a ring"),
        ([(0, 1, WRITABLE | HAS_NEXT, 1), (0, 1, 0, 0)], "behind a writable one"),
        ([(0, 16, INDIRECT, 0)], "indirect"),
        ([(-1, 1, 0, 0)], "outside the guest's memory"),
        ([(0, 0xFFFFFFFF, 0, 0)], "outside the guest's memory"),
        ([(2 * MEMORY_BYTES - 1, 2, 0, 0)], "outside the guest's memory"),
        ([(2**64 - 1 - GUEST_BASE, 0xFFFFFFFF, WRITABLE, 0)], "outside the guest's memory"),
    ],
)
def test_driver_that_breaks_the_rules_stops_its_ring(both, descriptors, words):
    ring, guest, _ = both
    ring.is_enabled = True
    ring.set_kick(os.dup(guest.kick_fd))
    for index, (offset, *rest) in enumerate(descriptors):
        guest.describe(index, GUEST_BASE + offset, *rest)
    guest.offer(0, kick=False)
    assert ring.is_running
    with pytest.raises(RingBroken, match=words):
        ring.take()
    assert not ring.is_running


@pytest.mark.parametrize("head", [RING_SIZE, 0xFFFF])
def test_head_outside_the_ring_is_refused(both, head):
    ring, guest, _ = both
    guest.offer(head, kick=False)
    with pytest.raises(RingBroken, match="outside a ring"):
        ring.take()


def test_more_buffers_than_entries_are_refused(both):
    ring, guest, _ = both
    guest.set_offered(RING_SIZE + 1)
    with pytest.raises(RingBroken, match="offers 17 buffers in 16 entries"):
        ring.take()


@pytest.mark.parametrize("size", [0, 3, 2048, 1 << 31])
def test_size_that_no_ring_has_is_refused(size):
    with pytest.raises(RingBroken):
        Ring().set_size(size)


def test_ring_outside_the_memory_is_refused(both):
    ring, _, _ = both
    ring.set_addresses(USER_BASE + MEMORY_BYTES - 8, USER_BASE, USER_BASE)
    with pytest.raises(RingBroken, match="not in the guest's memory"):
        ring.attach(Memory())


@settings(deadline=None)
@given(
    table=st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, 2**64 - 1),
                st.integers(GUEST_BASE - 64, GUEST_BASE + 64),
                st.integers(SECOND_BASE - 64, SECOND_BASE + MEMORY_BYTES + 64),
            ),
            st.one_of(st.integers(0, 128), st.integers(0, 2**32 - 1)),
            st.integers(0, 7) | st.integers(0, 0xFFFF),
            st.integers(0, RING_SIZE) | st.integers(0, 0xFFFF),
        ),
        max_size=RING_SIZE,
    ),
    heads=st.lists(st.integers(0, RING_SIZE) | st.integers(0, 0xFFFF), max_size=RING_SIZE),
    offered=st.none() | st.integers(0, 0xFFFF),
)
def test_no_chain_leaves_the_memory_or_goes_on_for_ever(table, heads, offered):
    with connected() as (ring, guest, _):
        for index, entry in enumerate(table):
            guest.describe(index, *entry)
        for head in heads:
            guest.offer(head, kick=False)
        if offered is not None:
            guest.set_offered(offered)
        assert take_all(ring) <= RING_SIZE


def take_all(ring: Ring) -> int:
    """Take and give back until there is nothing, or the ring is broken; return how many there were."""
    taken = 0
    with contextlib.suppress(RingBroken):
        while (chain := ring.take()) is not None:
            pieces = [*chain.readable, *chain.writable]
            assert all(0 < len(piece) <= MEMORY_BYTES for piece in pieces)
            ring.give(chain, 0)
            taken += 1
    return taken
