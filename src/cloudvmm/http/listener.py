"""The listening socket: made at a path under a lock, or inherited.

At a path P the file P.lock is locked for as long as the server lives, and never removed. Whoever holds the
lock knows that a socket left at P is stale. The lock belongs to the open file, not to the process, so two
servers in one process keep each other out too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from cloudvmm.host.lock import LockConflict, LockError, lock_file
from cloudvmm.http.error import ApiServerSocketFailed, ApiSocketInUse, NotAListener

_BACKLOG = 128


class Listener:
    """Owns the socket and the lock, if any. The socket never blocks."""

    __slots__ = ("_lock_fd", "_path", "socket")

    def __init__(self, listening: socket.socket, *, path: str | None = None, lock_fd: int = -1) -> None:
        self.socket = listening
        self._path = path
        self._lock_fd = lock_fd
        listening.setblocking(False)

    @classmethod
    def at_path(cls, path: str) -> Listener:
        """Make a socket at `path`, for its owner's eyes only, in place of a stale one.

        :raises ApiSocketInUse: a living server holds the path.
        :raises ApiServerSocketFailed: the operating system refuses.
        """
        lock_fd = _lock(path)
        try:
            return cls(_bind(path), path=path, lock_fd=lock_fd)
        except OSError as error:
            os.close(lock_fd)
            raise ApiServerSocketFailed from error

    @classmethod
    def from_fd(cls, fd: int) -> Listener:
        """Take over `fd`; it stays the caller's if this fails.

        :raises NotAListener: it is something else than a listening UNIX stream socket.
        """
        try:
            inherited = socket.socket(fileno=fd)
        except (OSError, ValueError) as error:
            raise NotAListener(fd) from error
        if not _is_listener(inherited):
            inherited.detach()
            raise NotAListener(fd)
        inherited.set_inheritable(False)
        return cls(inherited)

    def stop(self) -> None:
        """Listen no more: clients are refused at once instead of waiting in the queue. Keeps the lock."""
        self.socket.close()

    def close(self, *, remove_socket: bool) -> None:
        """Stop, and let the path go; remove the socket there if asked to, but never an inherited one."""
        self.stop()
        if remove_socket and self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _lock(path: str) -> int:
    try:
        if not path:
            # The kernel would make up a name, and nobody would know it.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        lock_fd = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:
        raise ApiServerSocketFailed from error
    try:
        lock_file(lock_fd, path=f"{path}.lock", write=True)
    except LockConflict:
        os.close(lock_fd)
        raise ApiSocketInUse(path) from None
    except LockError as error:
        os.close(lock_fd)
        raise ApiServerSocketFailed from error
    return lock_fd


def _bind(path: str) -> socket.socket:
    with contextlib.suppress(OSError):
        os.unlink(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file gets the mode that the socket has when it is bound. Setting it now, instead of the
        # process's umask around the bind, leaves no moment at which it is wrong and no other thread in doubt.
        os.fchmod(listening.fileno(), 0o600)
        listening.bind(path)
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _is_listener(candidate: socket.socket) -> bool:
    if candidate.family != socket.AF_UNIX or candidate.type != socket.SOCK_STREAM:
        return False
    return candidate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
