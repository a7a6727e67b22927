"""Whether what is about to be written fits on its disk: said before it is full, and others lack room too."""

from __future__ import annotations

import errno
import os
from typing import Final

from cloudvmm.engine.base import EngineError
from cloudvmm.host.room import free_disk

_MIB: Final = 1 << 20


class TooLittleDisk(EngineError):
    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        needed_mib, free_mib = -(-needed_bytes // _MIB), free_bytes // _MIB
        super().__init__(
            f"What is to be written takes {needed_mib} MiB, and the disk has {free_mib} MiB left"
        )


def check_disk(at: str | int, needed_bytes: int) -> None:
    """Look at the disk that `at`, a path or descriptor, is on.

    :raises TooLittleDisk: fewer bytes are free than `needed_bytes`.
    """
    try:
        free_bytes = free_disk(at)
    except OSError:
        return  # whoever writes there is told why not
    if free_bytes is not None and needed_bytes > free_bytes:
        raise TooLittleDisk(needed_bytes, free_bytes) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
