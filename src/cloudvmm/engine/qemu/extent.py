"""Copies of large sparse files: what is a hole stays one, and no page of them comes into this process."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from typing import Final

_CHUNK_BYTES: Final = 16 * 1024 * 1024  # between two looks at whether to go on
_PAGE_BYTES: Final = 2 * 1024 * 1024

# Called now and then with how many bytes of a file are done with, holes too. What it raises ends the copy.
OnCopied = Callable[[int], None]


def copy_file(source: int, target: int, *, check: OnCopied) -> None:
    """Blocking. Copy what there is of `source` to the same place in `target`, which gets the same size.

    :raises OSError: the system refused.
    """
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in extents(source, size):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            check(start)
            copied = os.sendfile(target, source, start, min(end - start, _CHUNK_BYTES))
            if copied == 0:
                raise OSError("The file became shorter")
            start += copied


def copy_from_huge_pages(source: int, target: int, *, check: OnCopied) -> None:
    """As `copy_file` for a `source` of huge pages, which the kernel sends nowhere, and has no holes of."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    nothing = bytes(_PAGE_BYTES)
    for start in range(0, size, _PAGE_BYTES):
        check(start)
        data = os.pread(source, _PAGE_BYTES, start)
        if data != nothing[: len(data)]:
            _write_at(target, data, start)


def copy_to_huge_pages(source: int, target: int, *, check: OnCopied) -> None:
    """As `copy_file` for a `target` of huge pages, which cannot be written to but by a mapping."""
    size = os.fstat(source).st_size
    with mmap.mmap(target, size) as mapping, memoryview(mapping) as view:
        for start, end in extents(source, size):
            while start < end:
                check(start)
                copied = os.preadv(source, [view[start : min(end, start + _CHUNK_BYTES)]], start)
                if copied == 0:
                    raise OSError("The file became shorter")
                start += copied


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def extents(fd: int, size: int) -> Iterable[tuple[int, int]]:
    """Yield where the data of a file begins and ends."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
