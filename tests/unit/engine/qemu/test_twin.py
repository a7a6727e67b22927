"""Memory taken over twice: what is there and what is not, and what ends it."""

from __future__ import annotations

import os

import pytest

from cloudvmm.config.number import MIB
from cloudvmm.engine.qemu import twin
from cloudvmm.engine.qemu.twin import Twin
from support.leak import Holdings

SIZE = 16 * MIB
HOLE = 5 * MIB


@pytest.fixture
def source():
    """Memory with a hole in it, and an end of no round number."""
    fd = os.memfd_create("source", os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, os.urandom(HOLE), 0)
    os.pwrite(fd, os.urandom(3 * MIB + 4096), HOLE + MIB)
    yield fd
    os.close(fd)


@pytest.fixture
def copied(source):
    with_leaks = Holdings()
    twin = Twin(source, SIZE)
    yield twin
    twin.close()
    with_leaks.assert_nothing_added()


def content(fd):
    return os.pread(fd, SIZE, 0)


@pytest.mark.parametrize("threads", [1, 3])
def test_all_is_taken_over_and_holes_stay(monkeypatch, source, copied, threads):
    monkeypatch.setattr(twin, "_threads", lambda: threads)
    copied.fill(lambda: None)
    assert content(copied.fd) == content(source)
    assert os.fstat(copied.fd).st_blocks == os.fstat(source).st_blocks


def test_second_copy_has_what_was_changed_and_given_back_meanwhile(source, copied):
    copied.fill(lambda: None)
    os.pwrite(source, b"changed", MIB + 5)
    os.pwrite(source, b"new", HOLE + 7)
    blocks = os.fstat(copied.fd).st_blocks
    copied.copy(lambda: None)
    assert content(copied.fd) == content(source)
    assert os.fstat(copied.fd).st_blocks == blocks + 8


def test_what_check_raises_ends_it(copied):
    def refuse():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        copied.fill(refuse)


def test_what_fails_beside_is_told(monkeypatch, copied):
    """The host refuses the memory in a thread beside this one."""
    refused = OSError("no memory")

    def refuse(fd, data, at):
        del data  # the error would keep it
        raise refused

    monkeypatch.setattr(twin, "_threads", lambda: 3)
    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="no memory"):
        copied.fill(lambda: None)


def test_host_without_threads_has_it_done_by_one(monkeypatch, source, copied):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(twin, "_threads", lambda: 3)
    monkeypatch.setattr(twin.threading.Thread, "start", refuse)
    copied.fill(lambda: None)
    assert content(copied.fd) == content(source)


def test_sealed_copy_is_changed_by_nobody(source, copied):
    copied.fill(lambda: None)
    copied.copy(lambda: None)
    fd = copied.seal()
    try:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        assert content(fd) == content(source)
    finally:
        os.close(fd)
