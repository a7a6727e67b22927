"""What a machine hands to another on the same host, over a socket pair."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from cloudvmm.engine.base import LinkLost, StateError
from cloudvmm.engine.qemu.handover import Handover, QueueGuard, offer, take
from cloudvmm.engine.qemu.memory import Ram, RamBacking

SIZE = 64 * 1024


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def memory(size: int, of_bytes: int) -> RamBacking:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    os.ftruncate(fd, of_bytes)
    ram = Ram(
        zone_id="ram",
        size=size,
        mergeable=False,
        hugepages=False,
        hugepage_size=None,
        prefault=False,
        reserve=False,
        hotplug_size=0,
        shared=True,
    )
    return RamBacking(device_id="ram", ram=ram, fd=fd)


def taken(far: socket.socket) -> tuple[Handover, contextlib.ExitStack]:
    undo = contextlib.ExitStack()
    return take(far.fileno(), undo, lambda: None), undo


def test_descriptors_arrive_under_their_names(pair):
    near, far = pair
    ram = memory(SIZE, SIZE)
    queues = [os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)]

    offer(near, {"ram": ram}, {"one": queues[:1], "other": queues[1:]})
    handover, undo = taken(far)

    with undo:
        assert inode(handover.memory["ram"]) == inode(ram.fds[0])
        assert {name: [inode(fd) for fd in fds] for name, fds in handover.taps.items()} == {
            "one": [inode(queues[0])],
            "other": [inode(queues[1])],
        }
        assert len(handover.queues) == 2
        fds = [*handover.memory.values(), *handover.queues]
        assert not any(map(os.get_inheritable, fds))
    ram.close()
    for fd in queues:
        os.close(fd)


def test_memory_that_is_too_small_is_refused(pair):
    near, far = pair
    ram = memory(SIZE, SIZE // 2)
    with contextlib.closing(ram):
        offer(near, {"ram": ram}, {})

        with contextlib.ExitStack() as undo, pytest.raises(StateError, match="smaller than it must be"):
            take(far.fileno(), undo, lambda: None)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"memory":[],"taps":[{"name":"n","queues":2}]}', "2 pieces of memory and TAP queues came with 0"),
        (b'{"memory":[],"taps":[{"name":"n","queues":0}]}', "0 pieces of memory and TAP queues came with 0"),
        (b"[]", "malformed"),
        (b"{", "malformed"),
    ],
)
def test_what_is_no_handover_is_refused(pair, raw, words):
    near, far = pair
    near.sendall(len(raw).to_bytes(4, "big") + raw)

    with contextlib.ExitStack() as undo, pytest.raises(StateError, match=words):
        take(far.fileno(), undo, lambda: None)


def test_end_of_the_other_side_is_told(pair):
    near, far = pair
    near.close()

    with contextlib.ExitStack() as undo, pytest.raises(LinkLost):
        take(far.fileno(), undo, lambda: None)


def test_queue_that_is_none_is_refused():
    with open("/dev/null", "rb") as file, pytest.raises(StateError, match="no TAP"):
        QueueGuard([file.fileno()])
