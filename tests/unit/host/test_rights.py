"""Descriptors that come over a UNIX socket."""

from __future__ import annotations

import os
import socket

import pytest

from cloudvmm.host.rights import receive_with_fds


@pytest.fixture
def ends():
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_descriptors_come_with_the_first_byte_and_are_not_for_children(ends, tmp_path):
    sender, receiver = ends
    with (tmp_path / "file").open("w") as file:
        socket.send_fds(sender, [b"word"], [file.fileno(), file.fileno()])
        data, fds, is_cut = receive_with_fds(receiver, 2, most_fds=4)
        assert (data, len(fds), is_cut) == (b"wo", 2, False)
        assert all(os.path.sameopenfile(fd, file.fileno()) for fd in fds)
        assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)
    assert receive_with_fds(receiver, 9, most_fds=4) == (b"rd", [], False)


def test_more_than_are_taken_are_told(ends):
    sender, receiver = ends
    socket.send_fds(sender, [b"x"], [sender.fileno()] * 5)
    data, fds, is_cut = receive_with_fds(receiver, 1, most_fds=2)
    for fd in fds:
        os.close(fd)
    assert (data, len(fds), is_cut) == (b"x", 2, True)


def test_end_and_nothing_yet_are_told_apart(ends):
    sender, receiver = ends
    with pytest.raises(BlockingIOError):
        receive_with_fds(receiver, 1, most_fds=1, flags=socket.MSG_DONTWAIT)
    sender.close()
    assert receive_with_fds(receiver, 1, most_fds=1) == (b"", [], False)
