"""OFD locks: who excludes whom, over which bytes, and for how long."""

from __future__ import annotations

import fcntl
import os

import pytest

from cloudvmm.host.lock import LockConflict, LockError, lock_file, unlock_file


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    return str(path)


@pytest.fixture
def opened(image):
    """Open the image anew; every call is another user of it."""
    fds = []

    def open_again(flags=os.O_RDWR):
        fds.append(os.open(image, flags | os.O_CLOEXEC))
        return fds[-1]

    yield open_again
    for fd in fds:
        os.close(fd)


def test_second_writer_is_refused_by_name(image, opened):
    lock_file(opened(), path=image, write=True, size_bytes=4096)
    with pytest.raises(LockConflict, match=image) as caught:
        lock_file(opened(), path=image, write=True, size_bytes=4096)
    assert caught.value.path == image
    assert isinstance(caught.value.__cause__, OSError)


def test_readers_share_and_exclude_a_writer(image, opened):
    lock_file(opened(os.O_RDONLY), path=image, write=False)
    lock_file(opened(os.O_RDONLY), path=image, write=False)
    with pytest.raises(LockConflict):
        lock_file(opened(), path=image, write=True)


def test_byte_range_leaves_what_lies_behind_it(image, opened):
    lock_file(opened(), path=image, write=True, size_bytes=4096)
    other = opened()

    fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 4096)
    with pytest.raises(BlockingIOError):
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 4095)


def test_tail_is_unlocked_alone(image, opened):
    fd = opened()
    lock_file(fd, path=image, write=True, size_bytes=4096)
    unlock_file(fd, start=1024)
    other = opened()

    fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1024)
    with pytest.raises(BlockingIOError):
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1023)


def test_whole_file_covers_what_is_appended_later(image, opened):
    lock_file(opened(), path=image, write=True)

    with pytest.raises(BlockingIOError):
        fcntl.lockf(opened(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 1 << 40)


def test_lock_is_idempotent_and_lasts_until_the_last_duplicate_is_closed(image, opened):
    first = os.open(image, os.O_RDWR)
    lock_file(first, path=image, write=True)
    lock_file(first, path=image, write=True)
    duplicate = os.dup(first)
    os.close(first)
    with pytest.raises(LockConflict):
        lock_file(opened(), path=image, write=True)
    os.close(duplicate)
    lock_file(opened(), path=image, write=True)


def test_write_lock_without_write_access_is_an_error_but_no_conflict(image, opened):
    with pytest.raises(LockError) as caught:
        lock_file(opened(os.O_RDONLY), path=image, write=True)
    assert not isinstance(caught.value, LockConflict)
