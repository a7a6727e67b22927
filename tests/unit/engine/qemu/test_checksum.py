"""Checksums: of what is in a file, not of where it has holes."""

from __future__ import annotations

import os
import zlib

import pytest

from cloudvmm.engine.qemu.checksum import Checksum

MIB = 1024 * 1024
SIZE = 5 * MIB + 4096


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def checksum_of(path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        with Checksum(fd) as checksum:
            return checksum.value()
    finally:
        os.close(fd)


def put(path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_nothing_has_no_checksum_to_speak_of(path):
    assert checksum_of(path) == 0
    put(path, 0, bytes(SIZE))
    assert checksum_of(path) == 0


def test_checksum_is_that_of_the_blocks_that_hold_something_and_of_their_places(path):
    put(path, 3 * MIB + 7, b"here")
    block = (bytes(7) + b"here").ljust(MIB, b"\0")
    assert checksum_of(path) == zlib.crc32(block, zlib.crc32((3 * MIB).to_bytes(8)))


def test_holes_do_not_matter(path, tmp_path):
    put(path, MIB, b"one")
    put(path, 5 * MIB, b"two")
    full = tmp_path / "full"
    full.write_bytes(path.read_bytes())
    assert checksum_of(full) == checksum_of(path) != 0


@pytest.mark.parametrize("at", [0, MIB - 1, 3 * MIB, SIZE - 1])
def test_one_bit_matters_wherever_it_is(path, at):
    put(path, 2 * MIB, b"kept")
    before = checksum_of(path)
    put(path, at, b"\x01")
    assert checksum_of(path) != before


def test_place_matters(path, tmp_path):
    other = tmp_path / "other"
    with other.open("wb") as file:
        file.truncate(SIZE)
    put(path, 0, b"same")
    put(other, MIB, b"same")
    assert checksum_of(path) != checksum_of(other)


def test_file_that_cannot_be_read_says_why(path):
    fd = os.open(path, os.O_WRONLY)
    put(path, 0, b"here")
    try:
        with Checksum(fd) as checksum, pytest.raises(OSError, match="Bad file descriptor"):
            checksum.value()
    finally:
        os.close(fd)


def test_it_can_be_left_before_its_end(path):
    put(path, 0, os.urandom(SIZE))
    fd = os.open(path, os.O_RDONLY)
    try:
        with Checksum(fd) as checksum:
            pass
        assert not checksum._thread.is_alive()
    finally:
        os.close(fd)
