"""What a disk image is, told by its content, the same for every engine."""

from __future__ import annotations

import os
from typing import Final

from cloudvmm.config.disk import ImageType
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.vmdk import VMDK_HEADER, VmdkExtent, flat_extents

SECTOR_BYTES: Final = 512
QCOW2_MAGIC: Final = b"QFI\xfb"
_VHD_MAGIC: Final = b"conectix"
_VHD_FIXED: Final = 2
_VHDX_MAGIC: Final = b"vhdxfile"
_VMDK_MAGIC: Final = VMDK_HEADER.encode()
_VMDK_MAX_BYTES: Final = 1024 * 1024

# What detection and options call an image type in messages.
_WORDS: Final = {
    ImageType.FLAT_VMDK: "vmdk",
    ImageType.FIXED_VHD: "vhd",
    ImageType.QCOW2: "qcow2",
    ImageType.RAW: "raw",
    ImageType.VHDX: "vhdx",
    ImageType.UNKNOWN: "unknown",
}


class DiskOpenError(DeviceError):
    """Cannot open disk path"""


class ImageIoError(OSError):
    """Names the image that could not be opened; the cause tells why, without the path.

    It is the operating system that refused, so the error's code stays that of `DiskOpenError`.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"I/O error (path={path} op=open)")


class ImageTypeMismatch(DeviceError):
    def __init__(self, specified: ImageType, detected: ImageType) -> None:
        super().__init__(
            "Disk image type does not match expected type:"
            f" specified = {_WORDS[specified]}, detected = {_WORDS[detected]}"
        )


def open_image_file(path: str, *, readonly: bool) -> int:
    """Return a new descriptor of `path`, which the caller closes; what it is and holds is not looked at.

    :raises DiskOpenError: it cannot be opened; the cause names it, and that one's cause tells why.
    """
    access = os.O_RDONLY if readonly else os.O_RDWR
    refusal = ImageIoError(path)
    try:
        # Non-blocking only for the open itself: a FIFO must not hang us.
        return os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        refusal.__cause__ = OSError(error.errno, error.strerror)
    except ValueError as error:
        refusal.__cause__ = error
    raise DiskOpenError from refusal


def check_type(specified: ImageType, detected: ImageType) -> None:
    """:raises ImageTypeMismatch: the image is not what it was said to be."""
    if specified not in (ImageType.UNKNOWN, detected):
        raise ImageTypeMismatch(specified, detected)


def detect(fd: int, size_bytes: int) -> ImageType:
    """Tell the type of the image open as `fd` by its magic; what has none is raw.

    :raises DiskOpenError: it cannot be read.
    """
    try:
        head = os.pread(fd, SECTOR_BYTES, 0)
        foot = os.pread(fd, SECTOR_BYTES, max(0, size_bytes - SECTOR_BYTES))
    except OSError as error:
        raise DiskOpenError from error
    if head.startswith(QCOW2_MAGIC):
        return ImageType.QCOW2
    if foot.startswith(_VHD_MAGIC) and int.from_bytes(foot[60:64]) == _VHD_FIXED:
        return ImageType.FIXED_VHD
    if head.startswith(_VHDX_MAGIC):
        return ImageType.VHDX
    if head.startswith(_VMDK_MAGIC) and vmdk_extents(fd) is not None:
        return ImageType.FLAT_VMDK
    return ImageType.RAW


def vmdk_extents(fd: int) -> list[VmdkExtent] | None:
    """Return the extents of the flat VMDK open as `fd`; None where it is none.

    :raises DiskOpenError: it cannot be read.
    """
    try:
        content = os.pread(fd, _VMDK_MAX_BYTES + 1, 0)
    except OSError as error:
        raise DiskOpenError from error
    if len(content) > _VMDK_MAX_BYTES:
        return None
    try:
        return flat_extents(content.decode("utf-8"))
    except UnicodeDecodeError:
        return None
