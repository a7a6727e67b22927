"""Memory taken over twice: once while its guest runs, and what is in it then once more, which is quick.

The first time, on several processors, costs the pages of the copy. The second time they are there: it goes
at the speed of memory.
What is a hole in the memory is one in the copy. In the end nobody can change the copy any more, QEMU neither.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from cloudvmm.engine.qemu.extent import extents

_CHUNK_BYTES: Final = 1 << 20  # other threads wait for as long as one takes
_MAX_THREADS: Final = 4
_MADV_POPULATE_READ: Final = 22
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

Chunk = tuple[int, int]  # from where, and up to where


def seal(fd: int) -> None:
    """Let nobody change the memory that `fd` refers to any more, nor what it is sealed against."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


class Twin:
    """A copy, in memory of our own, of the `size` bytes that `source_fd` refers to, which is lent."""

    def __init__(self, source_fd: int, size: int) -> None:
        """:raises OSError: the host does not give the memory."""
        self.fd = os.memfd_create("cloudvmm-base", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._source_fd = source_fd
        self._size = size
        self._source: mmap.mmap | None = None
        self._target: mmap.mmap | None = None
        try:
            os.ftruncate(self.fd, size)
            self._source = mmap.mmap(source_fd, size, prot=mmap.PROT_READ)
            self._target = mmap.mmap(self.fd, size)
        except BaseException:
            self.close()
            raise

    def fill(self, check: Callable[[], None]) -> None:
        """Blocking. Take over all that there is, for the first time, on several processors.

        What `check` raises, called now and then, ends it.

        :raises OSError: the host does not give the memory.
        """
        chunks = [
            (at, min(at + _CHUNK_BYTES, stop))
            for start, stop in extents(self._source_fd, self._size)
            for at in range(start, stop, _CHUNK_BYTES)
        ]
        _share_out(self._fill, chunks, check)

    def copy(self, check: Callable[[], None]) -> None:
        """Blocking. Take over once more all that there is. What `check` raises, as above, ends it."""
        assert self._source is not None and self._target is not None
        end = 0
        with memoryview(self._source) as source, memoryview(self._target) as target:
            for start, stop in extents(self._source_fd, self._size):
                self._clear(end, start)
                end = stop
                for at in range(start, stop, _CHUNK_BYTES):
                    check()
                    upto = min(at + _CHUNK_BYTES, stop)
                    target[at:upto] = source[at:upto]
            self._clear(end, self._size)

    def seal(self) -> int:
        """Let nobody change the copy any more. Return its descriptor, which is the caller's from now on."""
        self._unmap()
        seal(self.fd)
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        self._unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _fill(self, chunk: Chunk) -> None:
        """To write to the file makes its pages for less than to write to where it is mapped does."""
        assert self._source is not None and self._target is not None
        at, stop = start, _ = chunk
        with memoryview(self._source) as source:
            while at < stop:
                at += os.pwrite(self.fd, source[at:stop], at)
        with contextlib.suppress(OSError):  # the kernel is too old for it: then the copy does it
            self._target.madvise(_MADV_POPULATE_READ, start, stop - start)

    def _clear(self, start: int, stop: int) -> None:
        """Have no page from `start` to `stop`: the guest gave back what was there."""
        assert self._target is not None
        if start < stop:
            self._target.madvise(mmap.MADV_REMOVE, start, stop - start)

    def _unmap(self) -> None:
        for mapping in (self._source, self._target):
            if mapping is not None:
                mapping.close()
        self._source = self._target = None


def _share_out(do: Callable[[Chunk], None], chunks: Iterable[Chunk], check: Callable[[], None]) -> None:
    """Do it to all, on as many threads as there are processors for us; this one calls `check`, too."""
    left, failures = deque(chunks), list[BaseException]()

    def work(look: Callable[[], None] | None) -> None:
        try:
            for chunk in _taken_from(left):
                if failures:
                    return
                if look is not None:
                    look()
                do(chunk)
        except BaseException as error:
            failures.append(error)

    helpers: list[threading.Thread] = []
    with contextlib.suppress(RuntimeError):  # the host gives no more
        for _ in range(_threads() - 1):
            helper = threading.Thread(target=work, args=(None,), name="twin", daemon=True)
            helper.start()
            helpers.append(helper)
    work(check)
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]


def _taken_from(left: deque[Chunk]) -> Iterator[Chunk]:
    """Yield what no other thread takes."""
    with contextlib.suppress(IndexError):
        while True:
            yield left.popleft()


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), _MAX_THREADS)
