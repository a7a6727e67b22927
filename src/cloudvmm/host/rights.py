"""What the kernel tells of the other end of a UNIX socket: the descriptors that it sends, and who it is."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

_FD_BYTES = 4
# Plain numbers: what `socket` calls them takes microseconds to be joined, for each message that comes.
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_LOST = int(socket.MSG_CTRUNC)
_CREDENTIALS = struct.Struct("=iII")  # process, user, group


def receive_with_fds(
    connection: socket.socket, size: int, *, most_fds: int, flags: int = 0
) -> tuple[bytes, list[int], bool]:
    """Return at most `size` bytes, none at the end; the descriptors beside them; whether some were lost.

    Blocks as the socket does. The descriptors are the caller's, and close-on-exec from birth, which
    `socket.recv_fds` of Python 3.11 does not see to. The kernel may hand over more than `most_fds`, where
    they fit into the padding.

    :raises OSError: the connection is broken, or nothing is there and it may not block.
    """
    data, ancillary, said, _ = connection.recvmsg(
        size, socket.CMSG_SPACE(most_fds * _FD_BYTES), _CLOSE_ON_EXEC | flags
    )
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(content) - len(content) % _FD_BYTES
            fds.extend(memoryview(content)[:whole].cast("i"))
    return data, fds, bool(said & _LOST)


def uid_of_peer(connection: socket.socket) -> int:
    """Return the user that the other end had when it connected; one of another namespace has none, 65534.

    :raises OSError: the connection is broken.
    """
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(told)[1]
    return uid


def close_descriptors(fds: list[int]) -> None:
    """Close all of `fds` and empty the list."""
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())
