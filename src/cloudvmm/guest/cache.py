"""Where built guests lie, and how one appears there: whole, by rename, or not at all.

A guest is a folder `guest/<version>/` below the user's cache folder. Builders exclude each other by
a lock on `guest/.lock`; readers need no lock, for a folder that has its name is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cloudvmm.guest.error import GuestCacheMissing, GuestNotBuilt
from cloudvmm.guest.module import WANTED
from cloudvmm.guest.tree import own_files
from cloudvmm.host.cache import cache_folder, make_cache_folder

# Raised when the code that lays out the guest changes in a way its files do not show.
_LAYOUT = 1
_STAGING_PREFIX = ".building-"


class Guest(msgspec.Struct, frozen=True):
    """A built guest: absolute paths of its files, and its version."""

    kernel: str
    bzimage: str
    initramfs: str
    disk: str
    version: str

    @property
    def folder(self) -> str:
        return str(Path(self.kernel).parent)

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


def guests_folder() -> Path:
    """:raises GuestCacheMissing: the environment names no folder to keep things in."""
    folder = cache_folder()
    if folder is None:
        raise GuestCacheMissing
    return Path(folder) / "guest"


def source_hash() -> str:
    """Return a short hash of everything of ours that shapes the guest."""
    digest = hashlib.sha256(f"{_LAYOUT} {' '.join(WANTED)}".encode())
    for path, content in own_files().items():
        digest.update(f"\0{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def locate() -> Guest:
    """Return the newest guest that was built from our present sources. Takes milliseconds.

    :raises GuestNotBuilt: when there is none.
    """
    built = guests_folder().glob(f"*-{source_hash()}")
    folders = sorted((path.stat().st_mtime_ns, path) for path in built)
    if not folders:
        raise GuestNotBuilt
    return guest_in(folders[-1][1])


def guest_in(folder: Path) -> Guest:
    """Describe the guest in `folder`, whose name is the version."""
    return Guest(
        kernel=str(folder / "vmlinux"),
        bzimage=str(folder / "bzImage"),
        initramfs=str(folder / "initramfs.cpio"),
        disk=str(folder / "disk.raw"),
        version=folder.name,
    )


@contextlib.contextmanager
def building() -> Iterator[Path]:
    """Hold the builders' lock and give a fresh staging folder, removed at the end. Blocks.

    Staging folders of builders that died are swept away first: the lock says that none lives.
    """
    guests = guests_folder()
    make_cache_folder(str(guests.parent))
    guests.mkdir(exist_ok=True)
    lock = os.open(guests / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in guests.glob(f"{_STAGING_PREFIX}*"):
            shutil.rmtree(leftover)
        staging = guests / f"{_STAGING_PREFIX}{os.getpid()}"
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging)
    finally:
        os.close(lock)


def publish(folder: Path, version: str) -> Guest:
    """Give the complete guest in `folder` its name, replacing one of the same version."""
    final = guests_folder() / version
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        # Running VMs may have the old files open; they keep them.
        final.rename(folder.parent / "replaced")
    folder.rename(final)
    return guest_in(final)
