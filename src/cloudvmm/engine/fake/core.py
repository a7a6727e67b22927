"""A small valid ELF64 core: one note per vCPU, and all RAM as a hole of zeros. x86_64 only."""

from __future__ import annotations

import os
import struct
from typing import Final

_ET_CORE: Final = 4
_EM_X86_64: Final = 62
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_NT_PRSTATUS: Final = 1
_PRSTATUS_BYTES: Final = 336
_EHDR: Final = struct.Struct("<4sBBBB8xHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_PAGE_BYTES: Final = 4096


def core_head(*, vcpus: int, ram_bytes: int) -> bytes:
    """Return the file up to RAM: ELF header, two program headers, notes, padding to a page."""
    notes = b"".join(_prstatus(vcpu) for vcpu in range(vcpus))
    notes_at = _EHDR.size + 2 * _PHDR.size
    ram_at = -(-(notes_at + len(notes)) // _PAGE_BYTES) * _PAGE_BYTES
    head = _EHDR.pack(
        b"\x7fELF",
        2,
        1,
        1,
        0,
        _ET_CORE,
        _EM_X86_64,
        1,
        0,
        _EHDR.size,
        0,
        0,
        _EHDR.size,
        _PHDR.size,
        2,
        0,
        0,
        0,
    )
    head += _PHDR.pack(_PT_NOTE, 0, notes_at, 0, 0, len(notes), len(notes), 4)
    head += _PHDR.pack(_PT_LOAD, 0, ram_at, 0, 0, ram_bytes, ram_bytes, 0)
    return (head + notes).ljust(ram_at, b"\0")


def _prstatus(vcpu: int) -> bytes:
    """The note's `pr_pid` is the vCPU's number from 1, as QEMU writes it; its registers are zeros."""
    status = bytearray(_PRSTATUS_BYTES)
    struct.pack_into("<I", status, 32, vcpu + 1)
    return struct.pack("<III8s", 5, len(status), _NT_PRSTATUS, b"CORE") + bytes(status)


def write_core(fd: int, *, vcpus: int, ram_bytes: int) -> None:
    """Write the core where `fd`, a regular file, stands; RAM takes no room on disk.

    :raises OSError: `fd` cannot be written, or is no regular file.
    """
    start = os.lseek(fd, 0, os.SEEK_CUR)
    head = core_head(vcpus=vcpus, ram_bytes=ram_bytes)
    written = 0
    while written < len(head):
        written += os.write(fd, head[written:])
    os.ftruncate(fd, start + len(head) + ram_bytes)
    os.lseek(fd, 0, os.SEEK_END)
