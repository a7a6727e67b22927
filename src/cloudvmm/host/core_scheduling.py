"""Which threads may share a core of the host at a time: the kernel's core scheduling, by cookies.

Threads with the same cookie may run side by side on the hardware threads of a core, others may not. It is for
hosts with SMT; where the kernel has no core scheduling, or no core has several threads, nothing is done, as
in the reference.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from typing import Final

from cloudvmm.host.error import HostError

_PR_SCHED_CORE: Final = 62
_CREATE: Final = 1
_SHARE_TO: Final = 2
_SHARE_FROM: Final = 3
_ONE_THREAD: Final = 0
_SMT_FILE: Final = "/sys/devices/system/cpu/smt/active"
_ABSENT: Final = {errno.EINVAL, errno.ENODEV}  # no such call, or no core with several threads

# What to do with the thread of that id; returns 0 or an errno.
Prctl = Callable[[int, int], int]


class CoreSchedulingError(HostError):
    """The kernel has core scheduling, and did not do what was asked"""


def has_smt(path: str = _SMT_FILE) -> bool:
    """Say whether a core of the host has several threads that are in use."""
    try:
        with open(path, "rb") as file:
            return file.read(1) == b"1"
    except OSError:
        return False


def isolate(threads: Iterable[int], prctl: Prctl | None = None) -> None:
    """Give each of the `threads`, of any process of ours, a new cookie of its own.

    :raises CoreSchedulingError: the kernel refuses.
    """
    for thread in threads:
        _do(prctl or _prctl, _CREATE, thread)


def share(leader: int, followers: Iterable[int], prctl: Prctl | None = None) -> None:
    """Give the threads `followers` the cookie of the thread `leader`. Blocking, briefly.

    :raises CoreSchedulingError: the kernel refuses.
    """
    faults: list[CoreSchedulingError] = []

    def carry() -> None:
        try:
            _do(prctl or _prctl, _SHARE_FROM, leader)
            for follower in followers:
                _do(prctl or _prctl, _SHARE_TO, follower)
        except CoreSchedulingError as error:
            faults.append(error)

    # A cookie goes by way of whoever copies it, and stays with him: a thread that ends right away.
    carrier = threading.Thread(target=carry, name="core-cookie", daemon=True)
    carrier.start()
    carrier.join()
    for fault in faults:
        raise fault


def _do(prctl: Prctl, operation: int, thread: int) -> None:
    number = prctl(operation, thread)
    if number and number not in _ABSENT:
        raise CoreSchedulingError from OSError(number, os.strerror(number))


def _prctl(operation: int, thread: int) -> int:
    import ctypes  # 1.5 MiB, and for hosts with SMT alone

    call = ctypes.CDLL(None, use_errno=True).prctl
    return ctypes.get_errno() if call(_PR_SCHED_CORE, operation, thread, _ONE_THREAD, 0) else 0
