"""A folder that belongs to one process at a time, in which nobody else can put anything.

What is in it is believed: which process is to be ended, what is to be removed, where to write. So it has to
be its user's alone. Whoever else may write there could name any process and any file.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Final

from cloudvmm.host.error import HostError
from cloudvmm.host.lock import lock_file

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_FORMAT_BYTES: Final = 64


class FolderNotOurs(HostError):
    def __init__(self, path: str) -> None:
        super().__init__(f"Others may write to the folder {path!r}: it has to be yours, and yours alone")


def check_own(path: str) -> None:
    """:raises FolderNotOurs: other users may write to that folder. :raises OSError: there is none."""
    found = os.stat(path)
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
        raise FolderNotOurs(path)


def take_folder(path: str) -> int:
    """Make the folder (0700) where it is missing, and return a descriptor: it is ours until that is closed.

    :raises LockConflict: it is somebody else's now. :raises LockError: its file system does not lock.
    :raises FolderNotOurs: other users may write there. :raises OSError: it cannot be made or written.
    """
    os.makedirs(path, mode=0o700, exist_ok=True)
    check_own(path)
    fd = os.open(f"{path}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock_file(fd, path=f"{path}/lock", write=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def replace_file(path: str, data: bytes, *, is_synced: bool = False) -> None:
    """Have `data` at `path` (0600), at once and as a whole; with `is_synced` it outlives the host's end.

    :raises OSError: it cannot be written; what was there before is.
    """
    fresh = f"{path}.new"
    try:
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
            if is_synced:
                file.flush()
                os.fsync(fd)
        os.rename(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise


def format_of(folder: str, ours: str) -> str:
    """Return what the file `format` says; where there is none, it says `ours` from now on.

    :raises OSError: it cannot be read or written.
    """
    path = f"{folder}/format"
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(_FORMAT_BYTES).strip()
    except FileNotFoundError:
        replace_file(path, f"{ours}\n".encode())
        return ours
