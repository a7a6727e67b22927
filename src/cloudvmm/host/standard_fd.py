"""Standard input, output and error: descriptors whose numbers a program takes for granted."""

from __future__ import annotations

import fcntl
import os
from typing import Final

LAST_STANDARD_FD: Final = 2


def above_standard(fd: int) -> int:
    """Return `fd`, or in its place one that a child's standard input and output do not cover.

    `fd` is closed then, also where there is none.

    :raises OSError: no descriptor is left.
    """
    if fd > LAST_STANDARD_FD:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LAST_STANDARD_FD + 1)
    finally:
        os.close(fd)
