"""Root's powers apart from root's name: which of them we have, and which a thread passes on."""

from __future__ import annotations

import enum
import errno
import os
import struct
from collections.abc import Iterable
from typing import Final

from cloudvmm.host.syscall import system_call

_PRCTL: Final = 157
_CAPGET: Final = 125
_PR_CAPBSET_DROP: Final = 24
_CAPGET_VERSION: Final = 0x20080522
_SETS: Final = struct.Struct("=6I")  # effective, permitted, inheritable: the low words, then the high ones
_MOST: Final = 64


class Capability(enum.IntEnum):
    """Those that somebody keeps or needs, by the kernel's numbers."""

    CHOWN = 0
    DAC_OVERRIDE = 1
    DAC_READ_SEARCH = 2
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    NET_BIND_SERVICE = 10
    IPC_LOCK = 14
    SYS_PTRACE = 19
    SYS_NICE = 23


def lacking(wanted: Iterable[Capability]) -> list[Capability]:
    """Return those of `wanted` that the calling thread cannot use.

    :raises OSError: the kernel does not tell.
    """
    import ctypes  # see `system_call`

    sets = ctypes.create_string_buffer(_SETS.size)
    system_call(_CAPGET, struct.pack("=Ii", _CAPGET_VERSION, 0), ctypes.addressof(sets))
    low, _, _, high, _, _ = _SETS.unpack(sets.raw)
    held = low | high << 32
    return [each for each in wanted if not held >> each & 1]


def keep_capabilities(kept: Iterable[Capability]) -> None:
    """Let what the calling thread starts have no power of root but `kept`. The thread keeps its own.

    Nothing to do where we are not root. Whoever is root without the right to do this has few powers anyway.

    :raises OSError: the kernel refuses for another reason.
    """
    if os.geteuid() != 0:
        return
    for number in set(range(_MOST)) - set(kept):
        try:
            system_call(_PRCTL, _PR_CAPBSET_DROP, number, 0, 0, 0)
        except PermissionError:
            return
        except OSError as error:
            if error.errno != errno.EINVAL:  # there is no such power
                raise
