"""A file system that firmware reads: FAT16 over a whole disk, with files in its root folder alone.

So that no test needs mkfs.vfat and mtools for three files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

SECTOR_BYTES = 512
CLUSTER_SECTORS = 8
CLUSTER_BYTES = SECTOR_BYTES * CLUSTER_SECTORS
CLUSTERS = 16384  # 64 MiB
ROOT_ENTRIES = 512
FAT_SECTORS = (2 * (CLUSTERS + 2) + SECTOR_BYTES - 1) // SECTOR_BYTES
ROOT_SECTORS = ROOT_ENTRIES * 32 // SECTOR_BYTES
RESERVED_SECTORS = 1
FIRST_CLUSTER, END_OF_CHAIN = 2, 0xFFFF


def make_fat_disk(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a disk image that holds `files`, whose names have 8 letters and an ending of 3 at most."""
    table = [0xFFF8, END_OF_CHAIN]
    entries = []
    with path.open("wb") as disk:
        disk.write(_boot_sector())
        for name, content in files.items():
            first = len(table)
            count = -(-len(content) // CLUSTER_BYTES)
            table += [*range(first + 1, first + count), END_OF_CHAIN] if count else []
            entries.append(_entry(name, first if count else 0, len(content)))
            disk.seek(_data_start() + (first - FIRST_CLUSTER) * CLUSTER_BYTES)
            disk.write(content)
        assert len(table) <= CLUSTERS + FIRST_CLUSTER, "The files do not fit"
        for copy in range(2):
            disk.seek((RESERVED_SECTORS + copy * FAT_SECTORS) * SECTOR_BYTES)
            disk.write(struct.pack(f"<{len(table)}H", *table))
        disk.seek((RESERVED_SECTORS + 2 * FAT_SECTORS) * SECTOR_BYTES)
        disk.write(b"".join(entries))
        disk.truncate(_data_start() + CLUSTERS * CLUSTER_BYTES)
    return path


def _data_start() -> int:
    return (RESERVED_SECTORS + 2 * FAT_SECTORS + ROOT_SECTORS) * SECTOR_BYTES


def _boot_sector() -> bytes:
    total_sectors = _data_start() // SECTOR_BYTES + CLUSTERS * CLUSTER_SECTORS
    fields = struct.pack(
        "<3s8sHBHBHHBHHHIIBBBI11s8s",
        b"\xeb\x3c\x90",
        b"CLOUDVMM",
        SECTOR_BYTES,
        CLUSTER_SECTORS,
        RESERVED_SECTORS,
        2,
        ROOT_ENTRIES,
        0,
        0xF8,
        FAT_SECTORS,
        63,
        16,
        0,
        total_sectors,
        0x80,
        0,
        0x29,
        0x1234,
        b"CLOUDVMM   ",
        b"FAT16   ",
    )
    return fields.ljust(SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"


def _entry(name: str, first_cluster: int, size_bytes: int) -> bytes:
    stem, _, ending = name.partition(".")
    assert len(stem) <= 8 and len(ending) <= 3, name
    short = f"{stem.upper():8}{ending.upper():3}".encode("ascii")
    return struct.pack("<11sB14xHI", short, 0x20, first_cluster, size_bytes)
