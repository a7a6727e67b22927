"""The listening socket: made at a path under a lock, or inherited.

At a path P the file P.lock is locked for as long as the server lives. Whoever holds the lock knows that a
socket left at P is stale. The lock belongs to the open file, not to the process, so two servers in one
process keep each other out too. The file is removed by nobody, or by its holder alone: then whoever has
locked a file that is at P.lock no more has locked nothing.

A server that is to take a living one's place listens beside P, moves its socket to P in one step, so that no
client finds nobody, and has the lock once the other has ended. That one is found at P.previous until then,
at P.previous.2 and so on where others are found there yet, and leaves alone what lies at P.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from cloudvmm import http
from cloudvmm.host.inode import inode_of
from cloudvmm.host.lock import LockConflict, LockError, lock_file

_BACKLOG = 128
_MOST_KEPT = 100


class Listener:
    """Owns the socket and the lock, if any. The socket never blocks.

    With `removes_lock` the lock's file goes with it.
    """

    __slots__ = ("_inode", "_lock_fd", "_path", "_previous", "_removes_lock", "socket")

    def __init__(
        self,
        listening: socket.socket,
        *,
        path: str | None = None,
        lock_fd: int = -1,
        removes_lock: bool = False,
    ) -> None:
        self.socket = listening
        self._removes_lock = removes_lock
        self._path = path
        self._lock_fd = lock_fd
        self._inode = None if path is None else inode_of(path)
        self._previous: str | None = None
        listening.setblocking(False)

    @classmethod
    def at_path(cls, path: str, *, removes_lock: bool = False) -> Listener:
        """Make a socket at `path`, for its owner's eyes only, in place of a stale one.

        :raises ApiSocketInUse: a living server holds the path.
        :raises ApiServerSocketFailed: the operating system refuses.
        """
        lock_fd = _lock(path)
        try:
            return cls(_bind(path), path=path, lock_fd=lock_fd, removes_lock=removes_lock)
        except OSError as error:
            if removes_lock:
                _remove(f"{path}.lock")
            os.close(lock_fd)
            raise http.error.ApiServerSocketFailed from error

    @classmethod
    def beside(cls, path: str) -> Listener:
        """Make a socket beside `path`, for `take_place`.

        :raises ApiServerSocketFailed: the operating system refuses.
        """
        fresh = f"{path}.{os.getpid()}"
        try:
            return cls(_bind(fresh), path=fresh)
        except OSError as error:
            raise http.error.ApiServerSocketFailed from error

    @classmethod
    def from_fd(cls, fd: int) -> Listener:
        """Take over `fd`; it stays the caller's if this fails.

        :raises NotAListener: it is something else than a listening UNIX stream socket.
        """
        try:
            inherited = socket.socket(fileno=fd)
        except (OSError, ValueError) as error:
            raise http.error.NotAListener(fd) from error
        if not _is_listener(inherited):
            inherited.detach()
            raise http.error.NotAListener(fd)
        inherited.set_inheritable(False)
        return cls(inherited)

    def take_place(self, path: str) -> str:
        """Move the socket to `path`, where a living server has its own; return where that is found now.

        :raises ApiServerSocketFailed: the operating system refuses; then both are where they were.
        """
        assert self._path is not None
        try:
            previous = _keep(path)
            os.rename(self._path, path)
        except OSError as error:
            raise http.error.ApiServerSocketFailed from error
        self._path, self._previous = path, previous
        return previous

    def claim(self) -> bool:
        """Take the lock of the path, if the server that had it has ended; say whether it is ours."""
        if self._lock_fd < 0 and self._path is not None:
            try:
                self._lock_fd = _lock(self._path)
            except http.error.ApiSocketInUse:
                return False
            self._forget_previous()
        return True

    def stop(self) -> None:
        """Listen no more: clients are refused at once instead of waiting in the queue. Keeps the lock."""
        self.socket.close()

    def close(self, *, remove_socket: bool) -> None:
        """Stop, and let the path go; remove the socket there if asked to, but never somebody else's."""
        self.stop()
        if remove_socket and self._path is not None and inode_of(self._path) == self._inode:
            _remove(self._path)
        self._forget_previous()
        if self._lock_fd >= 0:
            if self._removes_lock:
                _remove(f"{self._path}.lock")
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _forget_previous(self) -> None:
        previous, self._previous = self._previous, None
        if previous is not None:
            from cloudvmm.host.dead_socket import remove_dead  # upgrades are rare

            remove_dead(previous)  # who does not end is found nowhere else


def _keep(path: str) -> str:
    """Give the socket at `path` another name, that of no living server's and no file of others; return it.

    :raises OSError: there is none.
    """
    from cloudvmm.host.dead_socket import remove_dead

    for name in (f"{path}.previous", *(f"{path}.previous.{number}" for number in range(2, _MOST_KEPT))):
        remove_dead(name)
        with contextlib.suppress(FileExistsError):
            with contextlib.suppress(FileNotFoundError):  # it has just ended
                os.link(path, name)
            return name
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _lock(path: str) -> int:
    try:
        if not path:
            # The kernel would make up a name, and nobody would know it.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        while True:
            lock_fd = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                lock_file(lock_fd, path=f"{path}.lock", write=True)
                found = os.fstat(lock_fd)
                if inode_of(f"{path}.lock") == (found.st_dev, found.st_ino):
                    return lock_fd
            except BaseException:
                os.close(lock_fd)
                raise
            os.close(lock_fd)  # its holder has removed it this moment
    except LockConflict:
        raise http.error.ApiSocketInUse(path) from None
    except OSError as error:
        raise http.error.ApiServerSocketFailed from _about_socket(error, path)
    except (LockError, ValueError) as error:
        raise http.error.ApiServerSocketFailed from error


def _about_socket(error: OSError, path: str) -> OSError:
    """Return `error` as one about the socket at `path`, unless its lock is there and at fault itself."""
    if not path or os.path.lexists(f"{path}.lock"):
        return error
    return OSError(error.errno, error.strerror, path)


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
