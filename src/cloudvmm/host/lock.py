"""Advisory locks on open file descriptions (``F_OFD_SETLK``).

Such a lock belongs to the open file, not to the process: it lasts until the last descriptor of that opening
is closed, so a descriptor passed to another process keeps it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from cloudvmm.host.error import HostError

_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


class LockError(HostError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The file {path} could not be locked")
        self.path = path


class LockConflict(LockError):
    """Someone else holds a lock that excludes ours."""

    def __init__(self, path: str, *, write: bool) -> None:
        HostError.__init__(
            self,
            f"The file {path} is locked by another user: cannot get a {'write' if write else 'read'} lock",
        )
        self.path = path


def lock_file(fd: int, *, path: str, write: bool, size_bytes: int | None = None) -> None:
    """Lock the file open as `fd` for writing (exclusive) or reading (shared); never blocks.

    `size_bytes` limits the lock to the first bytes; None, or 0, means the whole file however it grows.
    `path` is for the message. Locking again what this opening has locked already succeeds.

    :raises LockConflict: another opening holds a lock against it.
    :raises LockError: the file system does not lock, or `fd` was not opened for it.
    """
    kind = fcntl.F_WRLCK if write else fcntl.F_RDLCK
    try:
        _set(fd, kind, size_bytes or 0)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise LockConflict(path, write=write) from error
        raise LockError(path) from error


def unlock_file(fd: int, *, start: int = 0) -> None:
    """Unlock the file open as `fd` from the byte `start` on, for every process that has this opening."""
    _set(fd, fcntl.F_UNLCK, 0, start=start)


def _set(fd: int, kind: int, length: int, *, start: int = 0) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
