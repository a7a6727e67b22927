"""Flat VMDK images: their extents opened here, and a text for QEMU that names these descriptors.

QEMU would open what the image's own text names. It is given another text, in memory, in which each extent is
a set of descriptors that is handed over with it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Final

import msgspec

from cloudvmm.engine.image import SECTOR_BYTES, DiskOpenError
from cloudvmm.engine.vmdk import VmdkExtent

_FIRST_SET: Final = 1 << 20  # far above those that are counted up; QEMU reads no number above 31 bits
_TEXT: Final = """\
# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="twoGbMaxExtentFlat"

# Extent description
{}
# The Disk Data Base
#DDB
"""


class ExtentsInvalid(Exception):
    """What is wrong with the extents of an image, as the end of a sentence."""


class OpenExtent(msgspec.Struct, frozen=True):
    """`fd` opens in QEMU as a member of the set `set_id`."""

    fd: int
    set_id: int


class Extents(msgspec.Struct):
    """Owns the descriptors. `text_fd` is the text for QEMU."""

    opened: list[OpenExtent]
    text_fd: int

    @property
    def data_fds(self) -> list[int]:
        return [each.fd for each in self.opened]

    @property
    def fds(self) -> list[int]:
        return self.data_fds + ([] if self.text_fd < 0 else [self.text_fd])

    def move(self, find: Callable[[int], int]) -> None:
        """Stand on other descriptors, as a backing does."""
        moved = [OpenExtent(find(each.fd), each.set_id) for each in self.opened]
        self.opened = [each for each in moved if each.fd >= 0]
        self.text_fd = find(self.text_fd) if self.text_fd >= 0 else self.text_fd

    def close(self) -> None:
        """Idempotent."""
        for fd in self.fds:
            os.close(fd)
        self.opened, self.text_fd = [], -1


def open_extents(extents: list[VmdkExtent], *, folder: str, readonly: bool) -> Extents:
    """Open the extents, whose names are relative to `folder`, and write the text. The caller owns the result.

    :raises DiskOpenError: a file cannot be opened; the cause tells which and why.
    :raises ExtentsInvalid: QEMU cannot have such extents.
    """
    result = Extents([], -1)
    try:
        if not extents:
            raise ExtentsInvalid("it lists no extents")
        # Sets are never counted back: what QEMU has of a disk that was removed is not mixed up with this.
        first_set = _FIRST_SET + int.from_bytes(os.urandom(3))
        for set_id, extent in enumerate(extents, start=first_set):
            result.opened.append(OpenExtent(_open(extent, folder, readonly=readonly), set_id))
        lines = [
            f'RW {extent.sectors} FLAT "/dev/fdset/{each.set_id}" {extent.offset}\n'
            for extent, each in zip(extents, result.opened, strict=True)
        ]
        result.text_fd = os.memfd_create("cloudvmm-vmdk", os.MFD_CLOEXEC)
        os.write(result.text_fd, _TEXT.format("".join(lines)).encode())
    except OSError as error:
        result.close()
        raise DiskOpenError from error
    except BaseException:
        result.close()
        raise
    return result


def _open(extent: VmdkExtent, folder: str, *, readonly: bool) -> int:
    if extent.access == "NOACCESS" or (extent.access == "RDONLY" and not readonly):
        raise ExtentsInvalid(f"its extent {extent.name} is {extent.access}")
    if extent.sectors == 0:
        raise ExtentsInvalid(f"its extent {extent.name} has no size")
    access = os.O_RDONLY if readonly else os.O_RDWR
    # As in the reference, the last part of the name is no link. Non-blocking: a FIFO must not hang us.
    flags = access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(os.path.join(folder, extent.name), flags)
    except ValueError as error:
        raise ExtentsInvalid("the name of an extent has a NUL character") from error
    try:
        os.set_blocking(fd, True)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ExtentsInvalid(f"its extent {extent.name} is no regular file")
        if os.lseek(fd, 0, os.SEEK_END) < (extent.offset + extent.sectors) * SECTOR_BYTES:
            raise ExtentsInvalid(f"its extent {extent.name} is too short")
    except BaseException:
        os.close(fd)
        raise
    return fd
