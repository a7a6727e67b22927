"""Whether the kernel lets this process have userfaultfd, which tells of pages that are not there yet."""

from __future__ import annotations

import fcntl
import os
from typing import Final

_DEVICE: Final = "/dev/userfaultfd"
_IOC_NEW: Final = 0xAA00
_SYSCALL: Final = 323  # x86_64


def refusal(device: str = _DEVICE) -> OSError | None:
    """Return why it may not be had for faults of the kernel too, None where it may.

    There is a device, which has permissions, and a system call, which `vm.unprivileged_userfaultfd` guards.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        with open(device, "rb", buffering=0) as file:
            os.close(fcntl.ioctl(file, _IOC_NEW, flags))
        return None
    except OSError:
        return _refusal_of_call(flags)


def _refusal_of_call(flags: int) -> OSError | None:
    import ctypes  # large, and rarely wanted

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    fd = syscall(ctypes.c_long(_SYSCALL), ctypes.c_long(flags))
    if fd < 0:
        number = ctypes.get_errno()
        return OSError(number, os.strerror(number))
    os.close(fd)
    return None
