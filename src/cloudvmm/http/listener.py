"""The listening socket: made at a path under a lock, or inherited.

At a path P the file P.lock is locked for as long as the server lives, and never removed. Whoever holds the
lock knows that a socket left at P is stale. The lock belongs to the open file, not to the process, so two
servers in one process keep each other out too.

A server that is to take a living one's place listens beside P, moves its socket to P in one step, so that no
client finds nobody, and has the lock once the other has ended. That one is found at P.previous until then,
and leaves alone what lies at P.
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

    __slots__ = ("_inode", "_lock_fd", "_path", "_previous", "socket")

    def __init__(self, listening: socket.socket, *, path: str | None = None, lock_fd: int = -1) -> None:
        self.socket = listening
        self._path = path
        self._lock_fd = lock_fd
        self._inode = None if path is None else _inode_of(path)
        self._previous: str | None = None
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
    def beside(cls, path: str) -> Listener:
        """Make a socket beside `path`, for `take_place`.

        :raises ApiServerSocketFailed: the operating system refuses.
        """
        fresh = f"{path}.{os.getpid()}"
        try:
            return cls(_bind(fresh), path=fresh)
        except OSError as error:
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

    def take_place(self, path: str) -> str:
        """Move the socket to `path`, where a living server has its own; return where that is found now.

        :raises ApiServerSocketFailed: the operating system refuses; then both are where they were.
        """
        assert self._path is not None
        previous = f"{path}.previous"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(previous)
            with contextlib.suppress(FileNotFoundError):  # it has just ended
                os.link(path, previous)
            os.rename(self._path, path)
        except OSError as error:
            raise ApiServerSocketFailed from error
        self._path, self._previous = path, previous
        return previous

    def claim(self) -> bool:
        """Take the lock of the path, if the server that had it has ended; say whether it is ours."""
        if self._lock_fd < 0 and self._path is not None:
            try:
                self._lock_fd = _lock(self._path)
            except ApiSocketInUse:
                return False
            self._forget_previous()
        return True

    def stop(self) -> None:
        """Listen no more: clients are refused at once instead of waiting in the queue. Keeps the lock."""
        self.socket.close()

    def close(self, *, remove_socket: bool) -> None:
        """Stop, and let the path go; remove the socket there if asked to, but never somebody else's."""
        self.stop()
        if remove_socket and self._path is not None and _inode_of(self._path) == self._inode:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._forget_previous()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _forget_previous(self) -> None:
        previous, self._previous = self._previous, None
        if previous is not None:
            with contextlib.suppress(OSError):
                os.unlink(previous)


def _inode_of(path: str) -> tuple[int, int] | None:
    """Return what tells the file at `path` from others; None where there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


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
