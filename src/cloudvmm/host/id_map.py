"""Files of one user that are shown as another's, by a mount, without a change to them.

What the mount goes by is a user namespace. A program makes one, and waits in it until it is let go.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import struct
from typing import Final

from cloudvmm.host.program import locate
from cloudvmm.host.syscall import system_call
from cloudvmm.host.user import User

_OPEN_TREE: Final = 428
_CLONE: Final = 1 | os.O_CLOEXEC
_MOUNT_SETATTR: Final = 442
_MOUNT_ATTR_IDMAP: Final = 0x0010_0000
_EMPTY_PATH: Final = 0x1000
_UNSHARE: Final = "unshare"
_SHELL: Final = "/bin/sh"
_LONGEST_WAIT_S: Final = 10.0
_SAY_AND_WAIT: Final = "echo; read -r _"  # we say nothing, but our end, whatever it is, lets it go on


def clone_mount(fd: int) -> int:
    """Return a detached mount of the file of `fd` alone; the caller owns it.

    :raises OSError: the kernel refuses; we lack the right to mount, for one, or the file has no name.
    """
    return system_call(_OPEN_TREE, fd, b"\0", _CLONE | _EMPTY_PATH)


class IdMap:
    """What files of others look like to `user`: as if they were its own.

    Owns the programs that make user namespaces, one for the files of each owner. For one thread.
    """

    def __init__(self, user: User) -> None:
        self.user = user
        self._spare: _Namespace | None = None
        self._made: dict[tuple[int, int], _Namespace] = {}

    def __enter__(self) -> IdMap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the programs. What has been shown stays. Idempotent."""
        for namespace in (*self._made.values(), *filter(None, [self._spare])):
            namespace.close()
        self._made.clear()
        self._spare = None

    def prepare(self) -> None:
        """Begin what the first `show` will take, and go on: it is made meanwhile, in milliseconds."""
        if self._spare is None:
            with contextlib.suppress(OSError):  # it is tried again where it is needed
                self._spare = _Namespace()

    def open(self, fd: int, access: int) -> int:
        """Blocking for milliseconds. Return a new opening of the file of `fd`, whose owner is the user.

        :raises OSError: as `show`, or we lack the right to mount.
        """
        tree = clone_mount(fd)
        try:
            self.show(tree, os.fstat(fd))
            return os.open(f"/proc/self/fd/{tree}", access | os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(tree)

    def show(self, tree: int, owner: os.stat_result) -> None:
        """Blocking for milliseconds. Show what `owner` has in the detached mount `tree` as what the user has.

        :raises OSError: the kernel refuses, the file system cannot, or the program `unshare` is missing.
        """
        key = (owner.st_uid, owner.st_gid)
        namespace = self._made.get(key)
        if namespace is None:
            namespace, self._spare = self._spare or _Namespace(), None
            try:
                namespace.map(owner, self.user)
            except OSError:
                namespace.close()
                raise
            self._made[key] = namespace
        attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace.fd)
        system_call(_MOUNT_SETATTR, tree, b"\0", _EMPTY_PATH, attributes, len(attributes))


class _Namespace:
    """A user namespace, by `fd` once it maps somebody. Owns that, and the program that makes it and waits."""

    def __init__(self) -> None:
        """Begin to make it.

        :raises OSError: the program cannot be started.
        """
        self.fd = -1
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as given:
            self._said, say = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, self._said)
            given.callback(os.close, say)
            gate, opening = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, opening)
            given.callback(os.close, gate)
            self._pid = os.posix_spawn(
                locate(_UNSHARE),
                [_UNSHARE, "--user", "--", _SHELL, "-c", _SAY_AND_WAIT],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, gate, 0),
                    (os.POSIX_SPAWN_DUP2, say, 1),
                    (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),  # our caller goes on without
                ],
            )
            undo.callback(_end, self._pid)
            self._undo = undo.pop_all()

    def map(self, owner: os.stat_result, user: User) -> None:
        """Blocking until it is made. Have `owner` be `user` in it; nobody else is in it.

        :raises OSError: there is none to be had.
        """
        poller = select.poll()
        poller.register(self._said, select.POLLIN)
        if not poller.poll(_LONGEST_WAIT_S * 1000):
            raise TimeoutError(errno.ETIMEDOUT, "The program that makes a user namespace does not begin")
        if not os.read(self._said, 1):
            raise OSError(errno.EPERM, "There is no user namespace to be had")
        _write(f"/proc/{self._pid}/uid_map", b"%d %d 1\n" % (owner.st_uid, user.uid))
        _write(f"/proc/{self._pid}/gid_map", b"%d %d 1\n" % (owner.st_gid, user.gid))
        self.fd = os.open(f"/proc/{self._pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        self._undo.callback(os.close, self.fd)

    def close(self) -> None:
        """Idempotent."""
        self._undo.close()


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _write(path: str, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:  # in one write, as the kernel wants it
        file.write(data)
