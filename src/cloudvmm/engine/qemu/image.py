"""Disk images as files: open them, tell what they are, follow a chain of backing files.

QEMU is never asked to guess a format, and never opens an image by name: each file of the chain is opened
here and reaches QEMU as a descriptor. So the locks sit on the very open file that QEMU uses, and a header
that names other files cannot make it open them.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import Final, Literal

import msgspec

from cloudvmm.config.disk import ImageType
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.image import (
    SECTOR_BYTES,
    DiskOpenError,
    check_type,
    detect,
    open_image_file,
    vmdk_extents,
)
from cloudvmm.engine.qemu.vmdk import Extents, ExtentsInvalid, open_extents

_HEADER_BYTES: Final = 64 * 1024
_QCOW2_MIN_HEADER: Final = 72
_QCOW2_EXTERNAL_DATA: Final = 1 << 2
_QCOW2_BACKING_FORMAT: Final = 0xE2792ACA
_MAX_CHAIN: Final = 32
_BACKING_FORMATS: Final = {"raw": ImageType.RAW, "qcow2": ImageType.QCOW2, "vhdx": ImageType.VHDX}


class DiskPathMissing(DeviceError):
    """No disk path was specified when one was expected"""


class InvalidImage(DeviceError):
    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"Disk image {path} cannot be used: {reason}")


class BackingFilesDisabled(DeviceError):
    def __init__(self, path: str, base: str) -> None:
        super().__init__(f"Backing file support is disabled, and {path} has the backing file {base}")


class Image(msgspec.Struct, kw_only=True):
    """An open image file. `fd` is owned by whoever opened the image.

    `kind` is "file" or "host_device" (a block device). `size_bytes` is that of the file when it was opened.
    `data_bytes` limits a raw image to its data where something follows it. `base` is the backing image,
    `extents` are where the data is that a flat VMDK only names.
    """

    path: str
    fd: int
    image_type: ImageType
    readonly: bool
    size_bytes: int
    kind: Literal["file", "host_device"] = "file"
    direct: bool = False
    data_bytes: int | None = None
    base: Image | None = None
    extents: Extents | None = None

    def chain(self) -> list[Image]:
        """Return this image and its backing images, top first."""
        return [self] if self.base is None else [self, *self.base.chain()]

    def fds(self) -> list[int]:
        """Return the open descriptors of the whole chain."""
        return [
            *(image.fd for image in self.chain() if image.fd >= 0),
            *(fd for image in self.chain() if image.extents is not None for fd in image.extents.fds),
        ]

    def close(self) -> None:
        """Close the whole chain; idempotent."""
        for image in self.chain():
            if image.fd >= 0:
                os.close(image.fd)
                image.fd = -1
            if image.extents is not None:
                image.extents.close()


def open_image(
    path: str, *, readonly: bool, direct: bool, image_type: ImageType, backing_files: bool
) -> Image:
    """Open `path` and what it stands on. The caller owns the result and closes it.

    :raises DiskOpenError: a file cannot be opened; the cause tells which and why.
    :raises ImageTypeMismatch: it is not of `image_type`.
    :raises BackingFilesDisabled: it has a backing file, and `backing_files` is not set.
    :raises InvalidImage: its header is broken, or asks for what is not supported.
    """
    image = _open_file(path, readonly=readonly, direct=direct)
    try:
        image.image_type = detect(image.fd, image.size_bytes)
        check_type(image_type, image.image_type)
        # A guest that writes a qcow2 header into a raw image must not gain other files by it: unless the
        # image is declared as qcow2, no backing file is followed.
        _finish(image, follow=backing_files and image_type is ImageType.QCOW2, depth=0)
        if image.image_type is ImageType.FLAT_VMDK:
            # The same holds for what names its extents.
            if image_type is not ImageType.FLAT_VMDK:
                raise InvalidImage(path, "it names other files, and its type was not given as vmdk")
            _open_extents(image)
        if direct:
            _bypass_page_cache(image)
    except BaseException:
        image.close()
        raise
    return image


def preallocate(fd: int, size_bytes: int) -> None:
    """Take space for all of the file open as `fd`, as far as its file system can: nobody is refused for that.

    What is in it stays. The library's own way to do this writes to the file where there is no other.
    """
    import ctypes  # rare, and 1.5 MiB: not at the top

    ctypes.CDLL(None).fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes))


def _open_file(path: str, *, readonly: bool, direct: bool) -> Image:
    fd = open_image_file(path, readonly=readonly)
    try:
        kind = _kind(path, fd)
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        return Image(
            path=path,
            fd=fd,
            image_type=ImageType.UNKNOWN,
            readonly=readonly,
            size_bytes=os.lseek(fd, 0, os.SEEK_END),
            kind=kind,
            direct=direct,
        )
    except OSError as error:
        os.close(fd)
        raise DiskOpenError from error
    except BaseException:
        os.close(fd)
        raise


def _bypass_page_cache(image: Image) -> None:
    """Set O_DIRECT on the whole chain: last of all, since a header is not read by whole sectors.

    :raises DiskOpenError: a file system cannot do that.
    """
    try:
        for fd in [each.fd for each in image.chain()] if image.extents is None else image.extents.data_fds:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    except OSError as error:
        raise DiskOpenError from error


def _kind(path: str, fd: int) -> Literal["file", "host_device"]:
    mode = os.fstat(fd).st_mode
    if stat.S_ISBLK(mode):
        return "host_device"
    if not stat.S_ISREG(mode):
        raise InvalidImage(path, "it is neither a regular file nor a block device")
    return "file"


def _finish(image: Image, *, follow: bool, depth: int) -> None:
    """Fill in what the header of `image` says; open its backing image if `follow`."""
    match image.image_type:
        case ImageType.FIXED_VHD:
            image.data_bytes = _vhd_data_bytes(image)
        case ImageType.QCOW2:
            _finish_qcow2(image, follow=follow, depth=depth)
        case _:
            pass


def _open_extents(image: Image) -> None:
    folder = os.path.dirname(os.path.abspath(image.path))
    try:
        image.extents = open_extents(vmdk_extents(image.fd) or [], folder=folder, readonly=image.readonly)
    except ExtentsInvalid as error:
        raise InvalidImage(image.path, str(error)) from error


def _vhd_data_bytes(image: Image) -> int:
    """Return the size of the disk in the footer, which lies within the file."""
    footer = _read(image, SECTOR_BYTES, image.size_bytes - SECTOR_BYTES)
    data_bytes = int.from_bytes(footer[48:56])
    if data_bytes > image.size_bytes - SECTOR_BYTES or data_bytes % SECTOR_BYTES:
        raise InvalidImage(image.path, "its footer gives a size that the file does not have")
    return data_bytes


def _finish_qcow2(image: Image, *, follow: bool, depth: int) -> None:
    header = _read(image, _HEADER_BYTES, 0)
    if len(header) < _QCOW2_MIN_HEADER:
        raise InvalidImage(image.path, "its header is cut off")
    version = int.from_bytes(header[4:8])
    if version >= 3 and int.from_bytes(header[72:80]) & _QCOW2_EXTERNAL_DATA:
        raise InvalidImage(image.path, "its data lies in another file")
    if int.from_bytes(header[32:36]):
        raise InvalidImage(image.path, "it is encrypted")
    base_name = _backing_name(image, header)
    if base_name is None:
        return
    if not follow:
        raise BackingFilesDisabled(image.path, base_name)
    if depth >= _MAX_CHAIN:
        raise InvalidImage(image.path, f"its chain of backing files is longer than {_MAX_CHAIN}")
    image.base = _open_base(image, base_name, _backing_format(header, version), depth=depth)


def _open_base(image: Image, name: str, base_type: ImageType | None, *, depth: int) -> Image:
    if ":" in name.split("/", 1)[0]:
        raise InvalidImage(image.path, f"its backing file {name} is not a file")
    base = _open_file(os.path.join(os.path.dirname(image.path), name), readonly=True, direct=image.direct)
    try:
        base.image_type = base_type or detect(base.fd, base.size_bytes)
        if base.image_type is ImageType.FLAT_VMDK:
            raise InvalidImage(image.path, f"its backing file {name} is a vmdk")
        _finish(base, follow=True, depth=depth + 1)
    except BaseException:
        base.close()
        raise
    return base


def _backing_name(image: Image, header: bytes) -> str | None:
    offset, length = int.from_bytes(header[8:16]), int.from_bytes(header[16:20])
    if offset == 0:
        return None
    if length == 0 or length > 1023 or offset + length > len(header):
        raise InvalidImage(image.path, "the name of its backing file lies outside its header")
    try:
        return header[offset : offset + length].decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidImage(image.path, "the name of its backing file is not UTF-8") from error


def _backing_format(header: bytes, version: int) -> ImageType | None:
    """Return what the header says of the backing image's format; None where it says nothing that we know."""
    position = int.from_bytes(header[100:104]) if version >= 3 else _QCOW2_MIN_HEADER
    while position + 8 <= len(header):
        kind = int.from_bytes(header[position : position + 4])
        length = int.from_bytes(header[position + 4 : position + 8])
        if kind == 0:
            return None
        if kind == _QCOW2_BACKING_FORMAT:
            return _BACKING_FORMATS.get(header[position + 8 : position + 8 + length].decode("latin-1"))
        position += 8 + (length + 7) // 8 * 8
    return None


def _read(image: Image, length: int, offset: int) -> bytes:
    try:
        return os.pread(image.fd, length, offset)
    except OSError as error:
        raise DiskOpenError from error
