"""Landlock: which files and TCP ports a thread may still reach, and all that it starts from then on.

The kernel's own interface, by number: the C library has no names for it. What a thread has given up it never
gets back. Descriptors that are open already stay as they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from enum import IntFlag
from typing import TYPE_CHECKING, Final

from cloudvmm.host.error import HostError
from cloudvmm.host.syscall import renounce_privileges, system_call

if TYPE_CHECKING:
    from collections.abc import Iterable

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_ASK_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_TCP: Final = 0b11  # to bind and to connect
_SCOPES: Final = 0b11  # abstract sockets and signals
TCP_VERSION: Final = 4
_SCOPE_VERSION: Final = 6


class Access(IntFlag):
    """What may be done to a file, or beneath a folder."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15

    READ = READ_FILE | READ_DIR
    RUN = READ | EXECUTE
    USE = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV
    CHANGE = (
        WRITE_FILE
        | REMOVE_DIR
        | REMOVE_FILE
        | MAKE_CHAR
        | MAKE_DIR
        | MAKE_REG
        | MAKE_SOCK
        | MAKE_FIFO
        | MAKE_BLOCK
        | MAKE_SYM
        | REFER
        | TRUNCATE
    )


EVERYTHING: Final = ~Access(0)
_OF_FILES: Final = Access.EXECUTE | Access.USE
_KNOWN_FROM: Final = {Access.REFER: 2, Access.TRUNCATE: 3, Access.IOCTL_DEV: 5}


class LandlockError(HostError):
    """The kernel did not take a Landlock rule"""


class NoLandlock(LandlockError):
    def __init__(self, version: int, *, needed: int) -> None:
        has = f"has version {version} of it" if version else "has none, or it is not enabled"
        super().__init__(f"Version {needed} of Landlock is needed, and the kernel {has}")


def landlock_version() -> int:
    """Return the version of Landlock that the kernel has; 0 where it has none or it is not enabled."""
    try:
        return system_call(_CREATE_RULESET, None, 0, _ASK_VERSION)
    except OSError:
        return 0


class Ruleset:
    """What stays allowed. Everything that this kernel can forbid is forbidden but for that.

    Owns a descriptor. With `has_tcp` the network is left alone, with `is_scoped` signals and abstract sockets
    reach only who is restricted as well, both where the kernel can do that.
    """

    def __init__(
        self, *, needed: int = 1, accesses: Access = EVERYTHING, has_tcp: bool = True, is_scoped: bool = False
    ) -> None:
        """:raises NoLandlock: the kernel's is older than version `needed`.

        Accesses that are not among `accesses` are left alone.
        """
        version = landlock_version()
        if version < needed:
            raise NoLandlock(version, needed=needed)
        self._handled = _known_to(version) & accesses
        tcp = 0 if has_tcp or version < TCP_VERSION else _TCP
        scopes = _SCOPES if is_scoped and version >= _SCOPE_VERSION else 0
        attributes = struct.pack("=QQQ", self._handled, tcp, scopes)  # an older kernel takes zeroes
        try:
            self._fd = system_call(_CREATE_RULESET, attributes, len(attributes), 0)
        except OSError as error:
            raise LandlockError from error

    def allow(self, path: str | int, access: Access) -> None:
        """Allow `access` to the file, or beneath the folder, at `path` or behind a descriptor.

        Of what makes no sense for a file only the rest is allowed. What belongs to no file system, a pipe
        or memory, needs no rule.

        :raises OSError: there is no such file. :raises LandlockError: the kernel refuses.
        """
        with contextlib.ExitStack() as undo:
            fd = path if isinstance(path, int) else os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not isinstance(path, int):
                undo.callback(os.close, fd)
            is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
            allowed = access & self._handled & (EVERYTHING if is_folder else _OF_FILES)
            if not allowed:
                return
            try:
                rule = struct.pack("=Qi", allowed, fd)
                system_call(_ADD_RULE, self._fd, _PATH_BENEATH, rule, 0)
            except OSError as error:
                if error.errno != errno.EBADFD:
                    raise LandlockError from error

    def allow_present(self, paths: Iterable[str], access: Access) -> None:
        """As `allow`, of those of `paths` that are there."""
        for path in paths:
            with contextlib.suppress(OSError):
                self.allow(path, access)

    def restrict_thread(self) -> None:
        """Hold the calling thread, and whatever it starts, to the rules from here on.

        :raises LandlockError: the kernel refuses.
        """
        try:
            renounce_privileges()
            system_call(_RESTRICT_SELF, self._fd, 0)
        except OSError as error:
            raise LandlockError from error

    def close(self) -> None:
        """Idempotent. The rules stay in force where they are."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Ruleset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _known_to(version: int) -> Access:
    known = EVERYTHING
    for access, first in _KNOWN_FROM.items():
        if version < first:
            known &= ~access
    return known
