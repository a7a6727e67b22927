"""Checksums of large sparse files, taken beside what else is done with them: their copies take as long.

Where a file has holes says nothing about what is in it: blocks of nothing but zeroes are passed over.
"""

from __future__ import annotations

import os
import threading
import zlib
from types import TracebackType
from typing import Final

from cloudvmm.engine.qemu.extent import extents

_BLOCK_BYTES: Final = 1024 * 1024
_NOTHING: Final = bytes(_BLOCK_BYTES)


class Checksum:
    """Reads the file of `fd`, which is lent and stays as it is, on its own thread while it is entered."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._value = 0
        self._error: OSError | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checksum", daemon=True)

    def __enter__(self) -> Checksum:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def value(self) -> int:
        """Blocking. Return the CRC-32 of all that is not zero, and where it is.

        :raises OSError: the file cannot be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            size = os.fstat(self._fd).st_size
            block = bytearray(min(size, _BLOCK_BYTES))
            done = 0
            for start, end in extents(self._fd, size):
                for at in range(max(done, start - start % _BLOCK_BYTES), end, _BLOCK_BYTES):
                    if self._is_over.is_set():
                        return
                    self._add(block, at)
                    done = at + _BLOCK_BYTES
        except OSError as error:
            self._error = error

    def _add(self, block: bytearray, at: int) -> None:
        length = os.preadv(self._fd, [block], at)
        data = block if length == len(block) else block[:length]
        if data != _NOTHING[:length]:  # bytes: views are compared item by item
            self._value = zlib.crc32(data, zlib.crc32(at.to_bytes(8), self._value))
