"""Make the guest's root disk: a raw image with one partition, without root.

The partition table is written here; the file system is mke2fs' work.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from cloudvmm.guest.tool import run_tool
from cloudvmm.guest.tree import Entry

SECTOR_BYTES = 512
PARTITION_START_BYTES = 1 << 20
DISK_BYTES = 64 << 20
LABEL = "cloudvmm-root"

_LINUX = 0x83
_DISK_SIGNATURE = 0x434C564D
# Two builds of the same version make the same file system.
_FS_UUID = "636c6f75-6476-4d6d-8000-000000000001"


def master_boot_record(*, start_bytes: int, size_bytes: int) -> bytes:
    """Return the first sector of a disk with one Linux partition; both sizes in whole sectors."""
    start, remainder = divmod(start_bytes, SECTOR_BYTES)
    sectors, rest = divmod(size_bytes, SECTOR_BYTES)
    if remainder or rest or not 0 < start < 2**32 or not 0 < sectors < 2**32:
        raise ValueError(f"A partition of {size_bytes} bytes at {start_bytes} does not fit the table")
    beyond_chs = b"\xfe\xff\xff"
    partition = struct.pack("<B3sB3sII", 0, beyond_chs, _LINUX, beyond_chs, start, sectors)
    sector = b"\0" * 440 + struct.pack("<IH", _DISK_SIGNATURE, 0) + partition + b"\0" * 48 + b"\x55\xaa"
    assert len(sector) == SECTOR_BYTES
    return sector


def write_disk(path: Path, tree: Iterable[Entry], *, staging: Path) -> None:
    """Write the disk image `path` (sparse) that holds `tree`; `staging` is a folder to work in.

    :raises GuestBuildError: when mke2fs or debugfs is missing or refuses.
    """
    root = staging / "disk-root"
    entries = [entry for entry in tree if not stat.S_ISCHR(entry.mode)]
    _materialise(root, entries)
    size_bytes = DISK_BYTES - PARTITION_START_BYTES
    with path.open("wb") as disk:
        disk.write(master_boot_record(start_bytes=PARTITION_START_BYTES, size_bytes=size_bytes))
        disk.truncate(DISK_BYTES)
    run_tool(
        [
            *("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-L", LABEL, "-U", _FS_UUID),
            *("-J", "size=4", "-E", f"offset={PARTITION_START_BYTES},root_owner=0:0,hash_seed={_FS_UUID}"),
            *("-d", str(root), str(path), f"{size_bytes // 1024}k"),
        ],
        package="e2fsprogs",
        environment={"SOURCE_DATE_EPOCH": "0"},
    )
    if os.geteuid() != 0:
        _give_to_root(path, entries, staging=staging)


def _materialise(root: Path, entries: Iterable[Entry]) -> None:
    root.mkdir()
    for entry in entries:
        path = root / entry.path
        if stat.S_ISDIR(entry.mode):
            path.mkdir(exist_ok=True)
        elif stat.S_ISLNK(entry.mode):
            path.symlink_to(entry.content.decode())
            continue
        else:
            path.write_bytes(entry.content)
        path.chmod(stat.S_IMODE(entry.mode))


def _give_to_root(path: Path, entries: Iterable[Entry], *, staging: Path) -> None:
    """Make root the owner of every file: mke2fs copied the owner that the staging folder has."""
    commands = staging / "owners.debugfs"
    names = ["/lost+found", *(f"/{entry.path}" for entry in entries)]
    commands.write_text("".join(f"sif {name} uid 0\nsif {name} gid 0\n" for name in names))
    image = f"{path}?offset={PARTITION_START_BYTES}"
    run_tool(["debugfs", "-w", "-f", str(commands), image], package="e2fsprogs")
