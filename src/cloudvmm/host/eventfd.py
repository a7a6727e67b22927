"""An eventfd as an object: one counter in the kernel that wakes a poller."""

from __future__ import annotations

import errno
import os


class EventFd:
    """Non-blocking, close-on-exec. Owns its descriptor; `clone` duplicates it for another owner."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int | None = None) -> None:
        """Own `fd`, or a new eventfd with counter 0."""
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if fd is None else fd

    def fileno(self) -> int:
        return self._fd

    def write(self, value: int = 1) -> None:
        """Add `value` to the counter; wakes whoever polls.

        :raises OSError: the descriptor is closed.
        """
        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        os.eventfd_write(self._fd, value)

    def read(self) -> int:
        """Take the counter and set it to 0; 0 where nothing was written."""
        try:
            return os.eventfd_read(self._fd)
        except BlockingIOError:
            return 0

    def clone(self) -> EventFd:
        """Return another owner of the same counter."""
        return EventFd(os.dup(self._fd))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
