"""Disks that go along with a migration: which may, and the images that they are copied to. Calls block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.vm import VmConfig
from cloudvmm.host.lock import LockConflict, LockError, lock_file
from cloudvmm.migration.error import MigrationError


class DiskNotCopied(MigrationError):
    def __init__(self, disk_id: str, reason: str) -> None:
        super().__init__(f"The disk {disk_id} cannot be copied: {reason}")


def sizes_of(vm_config: VmConfig, ids: list[str], types: Mapping[str, ImageType]) -> dict[str, int]:
    """Return the bytes of each disk of `ids`, whose images are of `types`.

    :raises DiskNotCopied: one does not go along.
    """
    disks = {disk.id: disk for disk in vm_config.disks or ()}
    sizes = {}
    for disk_id in ids:
        disk = disks.get(disk_id)
        if disk is None:
            raise DiskNotCopied(disk_id, "there is none of that id")
        if disk.path is None:
            raise DiskNotCopied(disk_id, "a back end of its own serves it")
        if disk.readonly:
            raise DiskNotCopied(disk_id, "it is read-only: put its image there before")
        if types.get(disk_id) is not ImageType.RAW:
            raise DiskNotCopied(disk_id, "its image is not raw")
        sizes[disk_id] = _size_of(disk_id, disk.path)
    return sizes


class CopiedDisks:
    """The images at the destination. `discard` removes those that were made for it."""

    def __init__(self, vm_config: VmConfig, sizes: Mapping[str, int]) -> None:
        """Make what is not there.

        :raises DiskNotCopied: an image cannot be had, or is another disk's; nothing is left.
        """
        self._made: list[str] = []
        disks = {disk.id: disk for disk in vm_config.disks or ()}
        try:
            for disk_id, size_bytes in sizes.items():
                self._prepare(disk_id, disks.get(disk_id), size_bytes)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._made = []

    def _prepare(self, disk_id: str, disk: DiskConfig | None, size_bytes: int) -> None:
        if disk is None or disk.path is None:
            raise DiskNotCopied(disk_id, "there is none of that id at the destination")
        try:
            fd = os.open(disk.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            _check_image(disk_id, disk.path, size_bytes)
            return
        except (OSError, ValueError) as error:
            raise DiskNotCopied(disk_id, "its image cannot be made at the destination") from error
        self._made.append(disk.path)
        try:
            os.ftruncate(fd, size_bytes)
        except OSError as error:
            raise DiskNotCopied(disk_id, "its image cannot be made at the destination") from error
        finally:
            os.close(fd)


def _check_image(disk_id: str, path: str, size_bytes: int) -> None:
    """Look whether what is there can be written over. Who uses an image has it locked, its source too."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise DiskNotCopied(disk_id, "its image cannot be opened at the destination") from error
    try:
        found_bytes = os.lseek(fd, 0, os.SEEK_END)
        if found_bytes != size_bytes:
            raise DiskNotCopied(
                disk_id, f"its image has {found_bytes} bytes at the destination, and {size_bytes} where it is"
            )
        lock_file(fd, path=path, write=True)
    except LockConflict as error:
        raise DiskNotCopied(
            disk_id,
            "its image at the destination is in use, perhaps because it is the same: give another path",
        ) from error
    except (LockError, OSError) as error:
        raise DiskNotCopied(disk_id, "its image cannot be locked at the destination") from error
    finally:
        os.close(fd)


def _size_of(disk_id: str, path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise DiskNotCopied(disk_id, "its image cannot be opened") from error
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
