"""Whether the files of a payload can be started: looked at before QEMU, which would not start with a bad one.

A kernel or firmware is an ELF program with a PVH entry note; a kernel may be a bzImage too, and a
firmware a raw image, as OVMF's. Nothing is loaded here.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import BinaryIO

from cloudvmm.config.payload import PayloadConfig
from cloudvmm.engine.base import PayloadError

_PT_NOTE = 4
_PVH_NOTE_TYPE = 18
_PVH_NOTE_NAME = b"Xen\0"
_NOTE_LIMIT_BYTES = 1024 * 1024
_SETUP_MAGIC_OFFSET = 0x202
_FIRMWARE_STEP_BYTES = 64 * 1024


class NoPayload(PayloadError):
    """No bootitem provided: neither firmware nor kernel"""


class KernelUnreadable(PayloadError):
    """Cannot open kernel file"""


class FirmwareUnreadable(PayloadError):
    """Error manipulating firmware file"""


class InitramfsUnreadable(PayloadError):
    """Cannot open initramfs file"""


class KernelInvalid(PayloadError):
    """Cannot load the kernel into memory"""


class KernelLacksPvh(PayloadError):
    """Kernel lacks PVH header"""


class FirmwareInvalid(PayloadError):
    """The firmware is neither an ELF program nor an image of whole 64 KiB blocks"""


def check_payload(payload: PayloadConfig | None) -> None:
    """Raise what keeps `payload` from being started.

    :raises PayloadError: a file is missing, cannot be read, or is not of a kind that can be started.
    """
    if payload is None or (payload.kernel is None and payload.firmware is None):
        raise NoPayload
    if payload.kernel is not None:
        _check_kernel(payload.kernel)
        if payload.initramfs is not None:
            _check_initramfs(payload.initramfs)
    elif payload.firmware is not None:
        _check_firmware(payload.firmware)


def _check_kernel(path: str) -> None:
    try:
        with _open_file(path) as file:
            head = file.read(_SETUP_MAGIC_OFFSET + 4)
            if head.startswith(b"\x7fELF"):
                if not _has_pvh_note(file, head):
                    raise KernelLacksPvh
            elif head[_SETUP_MAGIC_OFFSET:] != b"HdrS":
                raise KernelInvalid from _loader_error()
    except (OSError, ValueError) as error:
        raise KernelUnreadable from error


def _loader_error() -> ValueError:
    """Return what the loader of the reference says of a file that is no kernel, for who knows its words."""
    reason = ValueError("Kernel Loader: Invalid bzImage")
    error = ValueError(f"Kernel Loader: failed to load bzImage kernel image: {reason}")
    error.__cause__ = reason
    return error


def _check_firmware(path: str) -> None:
    try:
        with _open_file(path) as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
            if head.startswith(b"\x7fELF"):
                if not _has_pvh_note(file, head):
                    raise KernelLacksPvh
            elif size == 0 or size % _FIRMWARE_STEP_BYTES:
                raise FirmwareInvalid
    except (OSError, ValueError) as error:
        raise FirmwareUnreadable from error


def _check_initramfs(path: str) -> None:
    try:
        with _open_file(path) as file:
            file.read(1)
    except (OSError, ValueError) as error:
        raise InitramfsUnreadable from error


def _open_file(path: str) -> BinaryIO:
    # A pipe or terminal in place of a file must not make the open wait.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "Not a regular file", path)
    return os.fdopen(fd, "rb")


def _has_pvh_note(file: BinaryIO, head: bytes) -> bool:
    """Look through the note segments of a little-endian ELF file, 32 or 64 bits."""
    try:
        if head[4] == 2:
            table_offset, entry_size, count = struct.unpack_from("<32xQ14xHH", head)
            layout = "<I4xQ16xQ"  # type, offset, size in the file
        else:
            table_offset, entry_size, count = struct.unpack_from("<28xI10xHH", head)
            layout = "<II8xI"
        for index in range(count):
            entry = _read_at(file, table_offset + index * entry_size, entry_size)
            kind, offset, size = struct.unpack_from(layout, entry)
            if kind == _PT_NOTE and _is_pvh_among(_read_at(file, offset, min(size, _NOTE_LIMIT_BYTES))):
                return True
    except (struct.error, IndexError):
        return False  # cut short
    return False


def _read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """Return what is there, nothing where `offset` lies beyond the end."""
    if offset >= os.fstat(file.fileno()).st_size:
        return b""
    file.seek(offset)
    return file.read(size)


def _is_pvh_among(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name_size, data_size, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_size]
        if kind == _PVH_NOTE_TYPE and name == _PVH_NOTE_NAME:
            return True
        position += 12 + (name_size + 3) // 4 * 4 + (data_size + 3) // 4 * 4
    return False
