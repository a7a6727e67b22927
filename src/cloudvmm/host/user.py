"""Users of the host that a process can be in the place of root: one that nobody else is, for one.

A thread asks the kernel what such a user may open by having its ids for *files* for the moment. By those
nobody may signal the thread; by its real ones a process of that user could, and us with it. They are of the
thread alone: the calls are the kernel's own, since the C library's speak for the whole process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import resource
import struct
import threading
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from cloudvmm.host.capability import Capability, lacking
from cloudvmm.host.error import HostError
from cloudvmm.host.syscall import system_call

_SETGROUPS: Final = 116
_SETFSUID: Final = 122
_SETFSGID: Final = 123
_STATFS: Final = 137
_PRCTL: Final = 157
_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_FACCESSAT2: Final = 439
_HERE: Final = -100
_BY_EFFECTIVE_IDS: Final = 0x200
_STATFS_BYTES: Final = 120  # the type first
# AFS, Ceph, CIFS, SMB 2, FUSE, NFS, 9P: who may open a file there is for their servers to say.
_FUSE: Final = 0x65735546
_SERVED_TYPES: Final = frozenset((0x5346414F, 0x00C36400, 0xFF534D42, 0xFE534D42, _FUSE, 0x6969, 0x01021997))
NOBODY: Final = 2**32 - 1  # whom no thread can be
_NUMBERLESS: Final = 65534  # what the kernel calls ids that a user namespace does not have
_ACTING: Final = threading.Lock()  # who can be dumped and traced is the whole process
# To start a process as another user, to end it, to bind its threads, to have what it has open, and to give it
# sockets and files.
_NEEDED: Final = (
    Capability.CHOWN,
    Capability.DAC_OVERRIDE,
    Capability.SETUID,
    Capability.SETGID,
    Capability.SETPCAP,
    Capability.KILL,
    Capability.SYS_NICE,
    Capability.SYS_PTRACE,
)
# Numbers that no system gives to anybody: above those of directories (sssd, winbind), below those of foreign
# systems. Where a user namespace does not have them, those that systemd gives to services for their time.
_RANGES: Final = (range(0x7800_0000, 0x7FF0_0000), range(61184, 65520))
_TRIES: Final = 64
# That of root holds for nobody who is root, and for everybody else: threads of QEMU are counted.
_FEWEST_THREADS: Final = 4096


class UserNotAvailable(HostError):
    def __init__(self, why: str) -> None:
        super().__init__(f"No process can be started as another user here: {why}")


class User(msgspec.Struct, frozen=True):
    """`groups` are those beside `gid`."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


class Want(msgspec.Struct, frozen=True):
    """To open `path` as `mode` says, one of `os.R_OK`, `os.W_OK` and `os.X_OK` or several."""

    path: str
    mode: int


def want_again(fd: int, access: int) -> Want:
    """Return what opening `fd` once more takes; `access` is `os.O_RDONLY` or `os.O_RDWR`."""
    return Want(f"/proc/self/fd/{fd}", os.R_OK if access == os.O_RDONLY else os.R_OK | os.W_OK)


def check_changeable() -> None:
    """:raises UserNotAvailable: we cannot start processes as other users and have them in hand."""
    if missing := lacking(_NEEDED):
        raise UserNotAvailable(f"we lack {', '.join(f'CAP_{each.name}' for each in missing)}")
    if not _may(Want("/", os.F_OK)):
        raise UserNotAvailable("this kernel does not tell what other users may open (Linux 5.8 does)")
    if _NUMBERLESS in os.getgroups():
        raise UserNotAvailable(
            "we are in a group that has no number in this user namespace, and would lose it"
        )
    threads, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if threads != resource.RLIM_INFINITY and threads < _FEWEST_THREADS:
        raise UserNotAvailable(
            f"the limit of processes (RLIMIT_NPROC) is {threads}, and {_FEWEST_THREADS} are needed"
        )


def lone_user() -> User:
    """Return one that no process is and that has no name; whoever asks next gets another, most likely.

    :raises UserNotAvailable: this user namespace has none to give.
    """
    cause = None
    for numbers in _RANGES:
        for _ in range(_TRIES):
            uid = numbers[int.from_bytes(os.urandom(8)) % len(numbers)]
            if _is_somebody(uid):
                continue
            try:
                with acting(User(uid, uid)):
                    return User(uid, uid)
            except OSError as error:
                cause = error
                break
    raise UserNotAvailable("this user namespace has none that is free") from cause


def refused(user: User, wants: Iterable[Want]) -> list[Want]:
    """Return those of `wants` that `user` may not have, although we may.

    :raises OSError: we cannot ask on behalf of that user.
    """
    with acting(user):
        found = [want for want in wants if not _may(want) or _is_mounters_alone(want.path)]
    return [want for want in found if os.access(want.path, want.mode)]


def is_judged_elsewhere(path: str) -> bool:
    """Say whether not this kernel decides who may open `path`: a power of root's is nothing there."""
    return _type_of(path) in _SERVED_TYPES


@contextlib.contextmanager
def acting(user: User) -> Iterator[None]:
    """Give the calling thread the ids for files, and the groups, of `user` for the moment.

    :raises OSError: the kernel refuses.
    """
    groups = os.getgroups()
    with _ACTING, contextlib.ExitStack() as undo:
        undo.callback(system_call, _PRCTL, _PR_SET_DUMPABLE, system_call(_PRCTL, _PR_GET_DUMPABLE))
        _set_groups(user.groups)
        undo.callback(_set_groups, groups)
        undo.callback(system_call, _SETFSGID, _set_files_id(_SETFSGID, user.gid))
        undo.callback(system_call, _SETFSUID, _set_files_id(_SETFSUID, user.uid))
        yield


def _set_files_id(number: int, wanted: int) -> int:
    """Return what it was. The kernel does not say whether it did it, but what it is."""
    before = system_call(number, wanted)
    if system_call(number, NOBODY) != wanted:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return before


def _may(want: Want) -> bool:
    """Say whether the thread may have what is wanted, by its ids for files."""
    path = os.fsencode(want.path) + b"\0"
    try:
        system_call(_FACCESSAT2, _HERE, path, want.mode, _BY_EFFECTIVE_IDS)
    except OSError:
        return False
    return True


def _set_groups(groups: Iterable[int]) -> None:
    packed = struct.pack(f"={len(tuple(groups))}I", *groups)
    system_call(_SETGROUPS, len(packed) // 4, packed)


def _is_somebody(uid: int) -> bool:
    """Say whether there is a process of this user, of whatever kind, or a name for it."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except OSError:
        with contextlib.suppress(KeyError):
            pwd.getpwuid(uid)
            return True
        return False
    return True


def _type_of(path: str) -> int:
    """Return the number of the file system's type; 0 where there is no such file."""
    import ctypes  # see `system_call`

    found = ctypes.create_string_buffer(_STATFS_BYTES)
    try:
        system_call(_STATFS, os.fsencode(path) + b"\0", ctypes.addressof(found))
    except OSError:
        return 0
    return int.from_bytes(found.raw[:8], "little")


def _is_mounters_alone(path: str) -> bool:
    """Say whether nobody but who mounted it gets into the file system of `path`, by whatever ids."""
    if _type_of(path) != _FUSE:
        return False
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        mounts = [line.split() for line in file]
    ends = [each[each.index("-") + 1 :] for each in mounts if each[2] == wanted]
    return any(end[0].startswith("fuse") and "allow_other" not in end[-1].split(",") for end in ends)
