"""Files that a guest sees as memory: what persistent memory and shared memory stand on."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.name import part_id
from cloudvmm.engine.qemu.parts import Properties, opened


class FileShorterThanMemory(DeviceError):
    def __init__(self, *, file_bytes: int, size: int) -> None:
        super().__init__(f"The file has {file_bytes} bytes, and the guest is to see {size} of it")


class NothingToMap(DeviceError):
    """The file is empty, and no size was given"""


class NotMappable(DeviceError):
    """It is neither a file nor a disk"""


class MappedBacking(Backing, kw_only=True):
    """`fd` is the file, which QEMU opens once more by it. `size` is bytes.

    `is_shared` tells whether the guest's writes reach the file.
    """

    size: int
    fd: int = -1
    is_shared: bool = True

    @property
    def fds(self) -> list[int]:
        return [] if self.fd < 0 else [self.fd]

    def move(self, find: Callable[[int], int]) -> None:
        self.fd = find(self.fd) if self.fd >= 0 else self.fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_mapped(device_id: str, fd: int, *, size: int | None, is_shared: bool = True) -> MappedBacking:
    """Return the backing of a file that is open as `fd`, which is its own from now on, fail or not.

    QEMU opens the file by way of our descriptor: what we looked at is what it gets, whatever the name is
    or becomes.

    :raises DeviceError: there is nothing to map, or less than `size`.
    """
    backing = MappedBacking(device_id=device_id, fd=fd, size=size or 0, is_shared=is_shared)
    try:
        backing.size = _mapped_bytes(fd, size)
    except BaseException:
        backing.close()
        raise
    return backing


def mapped_object(backing: MappedBacking) -> Properties:
    """Describe the memory that `backing` is to the guest."""
    return {
        "qom-type": "memory-backend-file",
        "id": part_id(backing.device_id, "mem"),
        "mem-path": opened(backing.fd),
        "size": backing.size,
        "share": backing.is_shared,
    }


def _mapped_bytes(fd: int, size: int | None) -> int:
    is_special = stat.S_ISCHR(os.fstat(fd).st_mode)  # memory of the host: it does not tell its size
    try:
        file_bytes = os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise NotMappable from error
    wanted = file_bytes if size is None else size
    if wanted == 0:
        raise NothingToMap
    if wanted > file_bytes and not is_special:
        raise FileShorterThanMemory(file_bytes=file_bytes, size=wanted)
    return wanted
