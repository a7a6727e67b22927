"""Disks: a virtio-blk device on a block node made of descriptors that are open already."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from cloudvmm.config.disk import DiskConfig, ImageType, LockGranularity
from cloudvmm.engine.base import DeviceError, ImageLocked
from cloudvmm.engine.qemu.backing import Backing, id_of
from cloudvmm.engine.qemu.image import DiskPathMissing, Image, open_image
from cloudvmm.engine.qemu.name import node_name, qdev_id
from cloudvmm.engine.qemu.parts import FdSet, Parts, Properties
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.host.lock import LockConflict, LockError, lock_file, unlock_file

# A fixed VHD is raw data with a footer behind it.
_DRIVERS = {
    ImageType.RAW: "raw",
    ImageType.FIXED_VHD: "raw",
    ImageType.QCOW2: "qcow2",
    ImageType.VHDX: "vhdx",
}


class ImageLockError(DeviceError):
    """A disk image could not be locked"""


class DiskBacking(Backing, kw_only=True):
    """An open disk image and how much of it is locked."""

    image: Image
    granularity: LockGranularity

    @property
    def fds(self) -> list[int]:
        return [image.fd for image in self.image.chain() if image.fd >= 0]

    def lock(self) -> None:
        """Lock the chain: what is writable for writing, what is read-only and backing files for reading.

        The locks sit on the descriptors that QEMU uses, so that they last as long as QEMU does. Idempotent.

        :raises ImageLocked: another process holds an image; those locked so far stay so until `close`.
        :raises ImageLockError: the file system cannot lock.
        """
        for image in self.image.chain():
            _lock(image, self.granularity)

    def release(self) -> None:
        """Unlock the chain, for QEMU too, which may hold it open still, and close it."""
        for image in self.image.chain():
            if image.fd >= 0:
                # A file system that is gone unlocks nothing; its image is closed all the same.
                with suppress(OSError):
                    unlock_file(image.fd)
        self.close()

    def close(self) -> None:
        """Close the chain; its locks last for as long as QEMU holds it."""
        self.image.close()


def open_disk(disk: DiskConfig) -> DiskBacking:
    """Open the image of `disk` and what it stands on; nothing is locked yet. The caller owns the result.

    :raises DeviceError: it cannot be had, or is not what `disk` says.
    """
    if disk.path is None:
        raise DiskPathMissing
    image = open_image(
        disk.path,
        readonly=disk.readonly,
        direct=disk.direct,
        image_type=disk.image_type,
        backing_files=disk.backing_files,
    )
    return DiskBacking(device_id=id_of(disk.id), image=image, granularity=disk.lock_granularity)


def disk_parts(disk: DiskConfig, backing: DiskBacking, seat: Seat) -> Parts:
    """Describe `disk` on its open image."""
    image = backing.image
    fdsets = [FdSet(each.fd, set_id) for set_id, each in enumerate(image.chain(), start=seat.first_fdset)]
    node = {"node-name": node_name(backing.device_id), **_format_node(disk, image, fdsets)}
    if not disk.readonly:
        node["discard"] = "unmap" if disk.sparse else "ignore"
    device: Properties = {
        "driver": "virtio-blk-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "disable-legacy": "on",
        "drive": node["node-name"],
        "num-queues": disk.num_queues,
        "queue-size": disk.queue_size,
        **({} if seat.boot_index is None else {"bootindex": seat.boot_index}),
        "discard": disk.sparse,
        "write-zeroes": disk.sparse,
        # The guest gets its I/O error. QEMU's default stops the whole VM where the host's disk is full.
        "werror": "report",
        "rerror": "report",
    }
    if disk.serial is not None:
        device["serial"] = disk.serial
    return Parts(fdsets=fdsets, blockdevs=[node], devices=[device])


def _format_node(disk: DiskConfig, image: Image, fdsets: list[FdSet]) -> Properties:
    cache = {"direct": image.direct, "no-flush": False}
    node: dict[str, Any] = {
        "driver": _DRIVERS[image.image_type],
        "read-only": image.readonly,
        "cache": cache,
        "file": _file_node(disk, image, fdsets[0], cache=cache),
    }
    if image.data_bytes is not None:
        node["size"] = image.data_bytes
    if image.image_type is ImageType.QCOW2:
        # None cuts the chain here, whatever the header says.
        node["backing"] = None if image.base is None else _format_node(disk, image.base, fdsets[1:])
    return node


def _file_node(disk: DiskConfig, image: Image, fdset: FdSet, *, cache: dict[str, bool]) -> Properties:
    """Describe the file below a format. Its locks are ours, on the descriptor that is passed."""
    native = image.direct and not disk.disable_aio
    return {
        "driver": image.kind,
        "filename": fdset.path,
        "locking": "off",
        "read-only": image.readonly,
        "aio": "native" if native else "threads",
        "cache": cache,
        "discard": "unmap" if disk.sparse and not image.readonly else "ignore",
    }


def _lock(image: Image, granularity: LockGranularity) -> None:
    whole = granularity is LockGranularity.FULL
    size_bytes = None if whole else image.size_bytes
    try:
        lock_file(image.fd, path=image.path, write=not image.readonly, size_bytes=size_bytes)
    except LockConflict as error:
        raise ImageLocked from error
    except LockError as error:
        raise ImageLockError from error
