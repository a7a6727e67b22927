"""Bytes from one socket to another through a pipe, so that they are not copied into this process and out."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Final

_PIPE_BYTES: Final = 1024 * 1024
_F_SETPIPE_SZ: Final = 1031  # no name in `fcntl` before Python 3.13
_FLAGS: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Conduit:
    """What was taken in and not yet given out is in it; `size` tells how much that is. Never blocks.

    Sockets are non-blocking ones: the flag of a call says nothing about them. For one thread.
    """

    def __init__(self) -> None:
        """:raises OSError: the system has no descriptor left."""
        self._read_fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # a small one does it, too
            fcntl.fcntl(self._write_fd, _F_SETPIPE_SZ, _PIPE_BYTES)
        self.size = 0

    def take_in(self, source_fd: int, size: int) -> int:
        """Take `size` bytes at most and return how many; none at the source's end.

        :raises BlockingIOError: there are none yet. :raises OSError: the source is gone.
        """
        taken = os.splice(source_fd, self._write_fd, size, flags=_FLAGS)
        self.size += taken
        return taken

    def give_out(self, target_fd: int) -> None:
        """Give as much as is taken at once.

        :raises BlockingIOError: nothing is. :raises OSError: the target is gone.
        """
        self.size -= os.splice(self._read_fd, target_fd, self.size, flags=_FLAGS)

    def close(self) -> None:
        os.close(self._read_fd)
        os.close(self._write_fd)
