"""A folder of our own for a socket that another program has to find by a path.

It is locked for as long as it is in use. So one whose user was killed can be told from others, and goes when
the next is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Final, Self

PREFIX: Final = "cloudvmm-socket-"
_SOCKET: Final = "s"
_TRIES: Final = 10


class ScratchFolder:
    """Owns the folder, mode 0700, and a descriptor of it. `socket_path` lies in it, for a socket alone."""

    def __init__(self) -> None:
        """:raises OSError: there is no place for it."""
        import tempfile  # rare, and it imports much

        _sweep(tempfile.gettempdir())
        for _ in range(_TRIES):
            self._path = tempfile.mkdtemp(prefix=PREFIX)
            with contextlib.suppress(FileNotFoundError, BlockingIOError):  # somebody sweeps it under our eyes
                self._fd = _locked(self._path)
                break
        else:
            raise FileNotFoundError(self._path)
        self.socket_path = f"{self._path}/{_SOCKET}"

    def close(self) -> None:
        """Remove it with its socket. Idempotent."""
        if self._fd >= 0:
            _remove(self._path, self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _sweep(parent: str) -> None:
    """Remove from `parent` what our own users' killed processes left."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX):
                with contextlib.suppress(OSError):
                    fd = _locked(entry.path)
                    try:
                        _remove(entry.path, fd)
                    finally:
                        os.close(fd)


def _locked(path: str) -> int:
    """Return a descriptor of the folder `path`, whose lock is ours until it is closed.

    :raises BlockingIOError: it is in use. :raises FileNotFoundError: it is gone. :raises OSError: it is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink == 0:
            raise FileNotFoundError(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove(path: str, fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_SOCKET, dir_fd=fd)
    with contextlib.suppress(OSError):  # gone, or somebody has put something there
        os.rmdir(path)
