"""System calls that neither Python nor the C library has a name for, of x86-64.

They are about the calling thread where the kernel says so, which is what our callers want: the C library's
own calls of that kind speak for the whole process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Final

_PR_SET_NO_NEW_PRIVS: Final = 38
_PRCTL: Final = 157
_UMOUNT: Final = 166
_DETACH: Final = 2


def system_call(number: int, *arguments: int | bytes | None) -> int:
    """Return what the kernel answers. `bytes` are passed as a pointer to them.

    :raises OSError: the kernel refuses.
    """
    call, long, get_errno = _library()
    answer: int = call(long(number), *(long(each) if isinstance(each, int) else each for each in arguments))
    if answer < 0:
        code = get_errno()
        raise OSError(code, os.strerror(code))
    return answer


@functools.cache
def _library() -> tuple[Callable[..., int], Callable[[int], Any], Callable[[], int]]:
    """Return what calls the kernel, what makes an argument of a number, and what tells the thread's error."""
    import ctypes  # rare, and not for nothing: not at the top

    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return call, ctypes.c_long, ctypes.get_errno


def renounce_privileges() -> None:
    """Let no program that the calling thread starts have more rights than the thread has, ever again.

    :raises OSError: the kernel refuses.
    """
    system_call(_PRCTL, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def unmount(path: str) -> None:
    """Take what is mounted at `path` away from there, also where it is in use.

    :raises OSError: the kernel refuses.
    """
    system_call(_UMOUNT, os.fsencode(path) + b"\0", _DETACH)
