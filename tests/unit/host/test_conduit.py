from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from cloudvmm.host.conduit import Conduit


@pytest.fixture
def conduit() -> Iterator[Conduit]:
    with contextlib.closing(Conduit()) as conduit:
        yield conduit


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, ...]]:
    """Who writes, what is taken in from, what is given out to, and who reads."""
    pairs = (*socket.socketpair(), *socket.socketpair())
    for sock in pairs:
        sock.setblocking(False)
    yield pairs
    for sock in pairs:
        sock.close()


def test_bytes_come_out_as_they_went_in(conduit, sockets):
    writer, source, target, reader = sockets
    writer.send(b"what is said")

    assert conduit.take_in(source.fileno(), 4) == 4
    assert conduit.size == 4
    conduit.give_out(target.fileno())
    assert conduit.size == 0
    assert reader.recv(64) == b"what"
    assert source.recv(64) == b" is said"


def test_nothing_is_waited_for(conduit, sockets):
    _, source, _, _ = sockets

    with pytest.raises(BlockingIOError):
        conduit.take_in(source.fileno(), 4)
    assert conduit.size == 0


def test_end_of_the_source_is_nothing(conduit, sockets):
    writer, source, _, _ = sockets
    writer.send(b"x")
    writer.shutdown(socket.SHUT_WR)

    assert [conduit.take_in(source.fileno(), 4) for _ in range(2)] == [1, 0]


def test_what_is_not_taken_stays_in(conduit, sockets):
    writer, source, target, reader = sockets
    with contextlib.suppress(BlockingIOError):
        while True:
            target.send(bytes(1024))
    writer.send(b"later")
    conduit.take_in(source.fileno(), 64)

    with pytest.raises(BlockingIOError):
        conduit.give_out(target.fileno())
    assert conduit.size == 5
    with contextlib.suppress(BlockingIOError):
        while reader.recv(65536):
            pass
    conduit.give_out(target.fileno())
    assert reader.recv(64) == b"later"


def test_target_that_is_gone_is_told(conduit, sockets):
    writer, source, target, reader = sockets
    writer.send(b"x")
    conduit.take_in(source.fileno(), 1)
    reader.close()

    with pytest.raises(BrokenPipeError):
        conduit.give_out(target.fileno())


def pipes() -> set[int]:
    found = set()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the folder itself
            if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
                found.add(fd)
    return found


def test_nothing_of_it_is_inherited_or_left():
    before = pipes()
    with contextlib.closing(Conduit()):
        made = pipes() - before
        assert len(made) == 2
        assert not any(os.get_inheritable(fd) for fd in made)
    assert pipes() == before
