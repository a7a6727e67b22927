"""The program: `python -m cloudvmm.vsock CID SOCKET CONNECTION_FD LISTENER_FD READY_FD`.

It serves one device and ends with its front end. When it is ready it writes a line to READY_FD. The listener
is bound to SOCKET already; whoever did that takes the file away.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Sequence
from typing import Final

from cloudvmm.vhost.error import ProtocolBroken
from cloudvmm.vhost.session import MEMORY_SLOT_LIMIT
from cloudvmm.vsock.device import Device
from cloudvmm.vsock.muxer import STREAM_LIMIT

_OTHER_FDS: Final = 64  # the rings', those of some memory, and some in reserve


def main(argv: Sequence[str]) -> int:
    cid, path, connection_fd, listener_fd, ready_fd = argv
    device = Device(
        socket.socket(fileno=int(connection_fd)),
        socket.socket(fileno=int(listener_fd)),
        cid=int(cid),
        path=path,
        limit=_stream_limit(),
    )
    os.write(int(ready_fd), b"\n")
    os.close(int(ready_fd))
    with contextlib.closing(device):
        try:
            device.run()
        except ProtocolBroken as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _stream_limit() -> int:
    """Return how many streams there are descriptors for, having asked for all that are to be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = STREAM_LIMIT + _OTHER_FDS + MEMORY_SLOT_LIMIT  # each region keeps one
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(STREAM_LIMIT, soft - _OTHER_FDS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
