"""Write a cpio archive in the "newc" form that the kernel unpacks as an initramfs.

Device nodes and owners are numbers in a header here, so no root is needed to make them. Reading
archives and compressing them are not our business.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

from cloudvmm.guest.tree import Entry

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


def write_cpio(entries: Iterable[Entry]) -> bytes:
    """Return the archive of `entries`, all owned by root, in the order given.

    A folder must come before what lies in it: the kernel makes no missing parents.
    """
    archive = bytearray()
    for number, entry in enumerate(entries, start=1):
        archive += _member(entry.path, entry.mode, entry.content, inode=number, device=entry.device)
    archive += _member(_TRAILER, 0, b"", inode=0, device=(0, 0))
    archive += b"\0" * (-len(archive) % 512)
    return bytes(archive)


def _member(path: str, mode: int, content: bytes, *, inode: int, device: tuple[int, int]) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    numbers = (inode, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % number for number in numbers)
    return _padded(header + name) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
