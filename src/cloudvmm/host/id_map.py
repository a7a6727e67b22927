"""Files of one user that are shown as another's, by a mount, without a change to them.

What the mount goes by is a user namespace. One is made by a program that ends at once.
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


def open_as(user: User, fd: int, access: int) -> int:
    """Blocking for milliseconds. Return a new opening of the file of `fd`, which is its owner's: `user`.

    :raises OSError: as `show_as`, or we lack the right to mount.
    """
    tree = clone_mount(fd)
    try:
        show_as(tree, user, os.fstat(fd))
        return os.open(f"/proc/self/fd/{tree}", access | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(tree)


def clone_mount(fd: int) -> int:
    """Return a detached mount of the file of `fd` alone; the caller owns it.

    :raises OSError: the kernel refuses; we lack the right to mount, for one, or the file has no name.
    """
    return system_call(_OPEN_TREE, fd, b"\0", _CLONE | _EMPTY_PATH)


def show_as(tree: int, user: User, owner: os.stat_result) -> None:
    """Blocking for milliseconds. Show what `owner` has in the detached mount `tree` as what `user` has.

    :raises OSError: the kernel refuses, the file system cannot, or the program `unshare` is missing.
    """
    with contextlib.ExitStack() as undo:
        namespace = _namespace(user, owner, undo)
        attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, namespace)
        system_call(_MOUNT_SETATTR, tree, b"\0", _EMPTY_PATH, attributes, len(attributes))


def _namespace(user: User, owner: os.stat_result, undo: contextlib.ExitStack) -> int:
    """Return a user namespace in which `owner` is `user`; closed by `undo`."""
    said, say = os.pipe2(os.O_CLOEXEC)
    undo.callback(os.close, said)
    gate, opening = os.pipe2(os.O_CLOEXEC)
    undo.callback(os.close, opening)
    try:
        pid = os.posix_spawn(
            locate(_UNSHARE),
            [_UNSHARE, "--user", "--", _SHELL, "-c", _SAY_AND_WAIT],
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, gate, 0),
                (os.POSIX_SPAWN_DUP2, say, 1),
                (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),  # our caller goes on without
            ],
        )
    finally:
        os.close(say)
        os.close(gate)
    undo.callback(_end, pid)
    poller = select.poll()
    poller.register(said, select.POLLIN)
    if not poller.poll(_LONGEST_WAIT_S * 1000):
        raise TimeoutError(errno.ETIMEDOUT, "The program that makes a user namespace does not begin")
    if not os.read(said, 1):
        raise OSError(errno.EPERM, "There is no user namespace to be had")
    _write(f"/proc/{pid}/uid_map", b"%d %d 1\n" % (owner.st_uid, user.uid))
    _write(f"/proc/{pid}/gid_map", b"%d %d 1\n" % (owner.st_gid, user.gid))
    namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    undo.callback(os.close, namespace)
    return namespace


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _write(path: str, data: bytes) -> None:
    with open(path, "wb", buffering=0) as file:  # in one write, as the kernel wants it
        file.write(data)
