"""A folder that is locked by its maker for as long as it is in use.

So one whose user was killed can be told from others by whoever sweeps where they lie. What was removed can
still be locked: how that is told depends on the file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from typing import Final

_TRIES: Final = 10


def make_locked(parent: str, prefix: str, *, is_there: Callable[[int], bool]) -> tuple[str, int]:
    """Make a folder for us alone; return its path, and the descriptor that holds the lock.

    :raises OSError: it cannot be made.
    """
    for _ in range(_TRIES):
        path = new_path(parent, prefix)
        os.mkdir(path, 0o700)
        try:
            return path, lock_folder(path, is_there=is_there)
        except (FileNotFoundError, BlockingIOError):  # somebody sweeps it under our eyes
            with contextlib.suppress(OSError):
                os.rmdir(path)
        except OSError:  # no descriptor is left
            os.rmdir(path)
            raise
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), parent)


def lock_folder(path: str, *, is_there: Callable[[int], bool]) -> int:
    """Return a descriptor of the folder `path`, whose lock is ours until it is closed.

    `is_there` says of a descriptor whether its folder was not removed.

    :raises BlockingIOError: it is in use. :raises FileNotFoundError: it is gone. :raises OSError: it is none.
    """
    fd = open_folder(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_there(fd):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_folder(path: str) -> int:
    """Return a descriptor of the folder `path`, which is no link. :raises OSError: it cannot be had."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def new_path(parent: str, prefix: str) -> str:
    """Return a path in `parent` that nobody has."""
    return f"{parent.rstrip('/')}/{prefix}{os.urandom(6).hex()}"
