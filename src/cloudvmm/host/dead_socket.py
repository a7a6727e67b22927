"""Sockets in the file system that nobody listens on: what a process leaves that was killed."""

from __future__ import annotations

import contextlib
import os
import socket
import stat


def is_dead(path: str | bytes) -> bool:
    """Tell whether a socket lies at `path` that nobody listens on."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)  # a queue that is full is somebody's
            client.connect(path)
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


def remove_dead(path: str | bytes) -> None:
    """Remove the socket at `path`, if nobody listens on it; whatever else lies there stays."""
    if is_dead(path):
        with contextlib.suppress(OSError):
            os.unlink(path)
