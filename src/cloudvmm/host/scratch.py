"""A folder of our own for a socket that another program has to find by a path.

It is locked for as long as it is in use, see `locked_folder.py`: one whose user was killed goes when the next
is made.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final, Self

from cloudvmm.host.locked_folder import lock_folder, make_locked, new_path
from cloudvmm.host.syscall import unmount
from cloudvmm.host.user import User, Want, refused

PREFIX: Final = "cloudvmm-socket-"
_SOCKET: Final = "s"
_PARENT: Final = "/tmp"


class ScratchFolder:
    """Owns the folder, mode 0700, and a descriptor of it. `socket_path` lies in it, for a socket alone."""

    def __init__(self, user: User | None = None) -> None:
        """`user` is who is to get to the socket, beside us.

        :raises OSError: there is no place for it.
        """
        self._user = user
        parent = _parent_for(user)
        sweep(parent)
        self._path, self._fd = make_locked(parent, PREFIX, is_there=_is_there)
        self.socket_path = f"{self._path}/{_SOCKET}"

    def show_socket(self) -> None:
        """Let the user connect to the socket, which is there now, and do nothing else in the folder.

        :raises OSError: the kernel refuses.
        """
        if self._user is not None:
            os.chown(self.socket_path, self._user.uid, -1)
            os.chmod(self._path, 0o711)

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


def scratch_parent() -> str:
    """Return where such folders are made."""
    return os.environ.get("TMPDIR") or _PARENT


def _parent_for(user: User | None) -> str:
    """Return the same, or in its place another one where `user` does not get to that."""
    chosen = scratch_parent()
    ways = [Want(chosen, os.X_OK), Want(_PARENT, os.X_OK)]
    if user is None or refused(user, ways) != ways[:1]:
        return chosen
    try:
        path = new_path(_PARENT, PREFIX)
        os.mkdir(path, 0o700)
        os.rmdir(path)
    except OSError:  # Landlock holds us, for one
        return chosen
    return _PARENT


def sweep(parent: str) -> None:
    """Remove from `parent` what our own users' killed processes left."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX):
                with contextlib.suppress(OSError):
                    fd = lock_folder(entry.path, is_there=_is_there)
                    try:
                        _remove(entry.path, fd)
                    finally:
                        os.close(fd)


def _is_there(fd: int) -> bool:
    return os.fstat(fd).st_nlink > 0


def _remove(path: str, fd: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        remove_file(path, _SOCKET, dir_fd=fd)
    with contextlib.suppress(OSError):  # gone, or somebody has put something there
        os.rmdir(path)


def remove_file(folder: str, name: str, *, dir_fd: int | None = None) -> None:
    """Remove `name` from `folder`, which is open as `dir_fd`, also where a file is mounted on it.

    That is one that was on its way to another process when its manager was killed.

    :raises OSError: it is not there, or the kernel refuses.
    """
    target = f"{folder}/{name}" if dir_fd is None else name
    try:
        os.unlink(target, dir_fd=dir_fd)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        unmount(f"{folder}/{name}")
        os.unlink(target, dir_fd=dir_fd)
