"""Disks on images: a virtio-blk device on a block node made of descriptors that are open already."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cloudvmm.config.disk import DiskConfig, ImageType, LockGranularity
from cloudvmm.engine.base import DeviceError, EngineError, ImageLocked
from cloudvmm.engine.qemu.affinity import thread_objects, thread_properties
from cloudvmm.engine.qemu.backing import Backing, id_of
from cloudvmm.engine.qemu.image import DiskPathMissing, Image, open_image, preallocate
from cloudvmm.engine.qemu.name import below_name, node_name, qdev_id
from cloudvmm.engine.qemu.parts import FdSet, Parts, Properties
from cloudvmm.engine.qemu.rate_limit import limiter_id, throttle_group
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.host.lock import LockConflict, LockError, lock_file, unlock_file

# A fixed VHD is raw data with a footer behind it.
_DRIVERS = {
    ImageType.RAW: "raw",
    ImageType.FIXED_VHD: "raw",
    ImageType.QCOW2: "qcow2",
    ImageType.VHDX: "vhdx",
    ImageType.FLAT_VMDK: "vmdk",
}


class ImageLockError(DeviceError):
    """A disk image could not be locked"""


class ImageNotResizable(DeviceError):
    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"Disk image {path} cannot be resized: {reason}")


class DiskBacking(Backing, kw_only=True):
    """An open disk image, how much of it is locked, and whether it has its whole space from the start.

    `image_node` is QEMU's name of the node of `image`, "" where it has none.
    """

    image: Image
    granularity: LockGranularity
    is_preallocated: bool = False
    image_node: str = ""

    @property
    def fds(self) -> list[int]:
        return self.image.fds()

    def move(self, find: Callable[[int], int]) -> None:
        for image in self.image.chain():
            image.fd = find(image.fd) if image.fd >= 0 else image.fd
            if image.extents is not None:
                image.extents.move(find)

    def lock(self) -> None:
        """Lock the chain: what is writable for writing, what is read-only and backing files for reading.

        The locks sit on the descriptors that QEMU uses, so that they last as long as QEMU does. Only then is
        space taken for the image, if it is to be. Idempotent.

        :raises ImageLocked: another process holds an image; those locked so far stay so until `close`.
        :raises ImageLockError: the file system cannot lock.
        """
        for image in self.image.chain():
            _lock(image, self.granularity, image.size_bytes)
        if self.is_preallocated:
            preallocate(self.image.fd, self.image.size_bytes)

    def check_resize(self, size_bytes: int, *, before_bytes: int) -> None:
        """Raise why the image cannot have `size_bytes`; the disk has `before_bytes`.

        :raises ImageNotResizable: the reference has no means for it, which QEMU might do all the same.
        """
        image = self.image
        kind = image.image_type
        if kind not in (ImageType.RAW, ImageType.QCOW2):
            raise ImageNotResizable(image.path, f"its type {kind.value} has no new sizes")
        if kind is ImageType.QCOW2 and size_bytes < before_bytes:
            raise ImageNotResizable(image.path, "a qcow2 image does not shrink")
        if image.base is not None:
            raise ImageNotResizable(image.path, "it has a backing file")
        if image.kind == "host_device" and os.lseek(image.fd, 0, os.SEEK_END) != size_bytes:
            raise ImageNotResizable(image.path, f"the block device is not of {size_bytes} bytes")

    def lock_for(self, size_bytes: int) -> None:
        """Have the lock cover what the image is about to be resized to.

        :raises ImageLocked: another process holds what it would grow into.
        :raises ImageLockError: the file system cannot lock.
        """
        # A qcow2 image grows when it is written to, and no lock follows that either.
        if self.image.image_type is ImageType.RAW and size_bytes > self.image.size_bytes:
            _lock(self.image, self.granularity, size_bytes)

    def settle_lock(self) -> None:
        """Have the lock cover what the image is now, after it was resized or was not."""
        image = self.image
        if image.fd < 0:
            return  # the guest has let go of it meanwhile
        with suppress(OSError, ImageLocked, ImageLockError):
            image.size_bytes = os.lseek(image.fd, 0, os.SEEK_END)
            _lock(image, self.granularity, image.size_bytes)
            if self.granularity is LockGranularity.BYTE_RANGE and image.size_bytes:
                unlock_file(image.fd, start=image.size_bytes)

    def lock_overlay(self, overlay: Image) -> None:
        """Keep others from an image that is to be above this one.

        :raises ImageLocked: another process holds it.
        :raises ImageLockError: the file system cannot lock.
        """
        _lock(overlay, self.granularity, overlay.size_bytes)

    def stand_on(self, overlay: Image, *, node: str) -> None:
        """Go on with `overlay`, which is locked and QEMU's `node`; the image until now is below, for reading.

        Others may read that, too, from now on.
        """
        self._share(self.image)
        overlay.base = self.image
        self.image, self.image_node = overlay, node
        self.is_preallocated = False

    def claim_below(self) -> None:
        """Keep others from the image below, which is about to be written.

        :raises ImageLocked: another process reads it.
        :raises ImageLockError: the file system cannot lock.
        """
        base = self.image.base
        assert base is not None
        base.readonly = False
        try:
            _lock(base, self.granularity, base.size_bytes)
        except EngineError:
            base.readonly = True
            raise

    def leave_below(self) -> None:
        """Let others read the image below again: it is not written after all."""
        assert self.image.base is not None
        self._share(self.image.base)

    def stand_below(self, *, node: str) -> None:
        """Go back to the image below, which is claimed and QEMU's `node`; the overlay is closed."""
        overlay, base = self.image, self.image.base
        assert base is not None
        self.image, self.image_node = base, node
        overlay.base = None
        overlay.close()

    def _share(self, image: Image) -> None:
        image.readonly = True
        with suppress(ImageLocked, ImageLockError):  # it has one for writing, of which this is a part
            _lock(image, self.granularity, image.size_bytes)

    def unlock(self) -> None:
        """Unlock the chain, for QEMU too, which may hold it open still."""
        for image in self.image.chain():
            if image.fd >= 0:
                # A file system that is gone unlocks nothing.
                with suppress(OSError):
                    unlock_file(image.fd)

    def release(self) -> None:
        """Unlock the chain and close it."""
        self.unlock()
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
    device_id = id_of(disk.id)
    image = open_image(
        disk.path,
        readonly=disk.readonly,
        direct=disk.direct,
        image_type=disk.image_type,
        backing_files=disk.backing_files,
    )
    return DiskBacking(
        device_id=device_id,
        image=image,
        granularity=disk.lock_granularity,
        image_node=node_name(device_id) if limiter_id(disk) is None else below_name(device_id),
        is_preallocated=not disk.sparse and not disk.readonly and image.image_type is ImageType.RAW,
    )


def disk_parts(disk: DiskConfig, backing: DiskBacking, seat: Seat) -> Parts:
    """Describe `disk` on its open image."""
    image = backing.image
    fdsets = _fdsets(image, seat.first_fdset)
    limiter = limiter_id(disk)
    node = _format_node(disk, image, fdsets)
    if not disk.readonly:
        node["discard"] = "unmap" if disk.sparse else "ignore"
    if limiter is not None:
        # The image has a name, too: an overlay comes between it and the limit.
        node = _throttle_node(limiter, {"node-name": below_name(backing.device_id), **node})
    node = {"node-name": node_name(backing.device_id), **node}
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
        "write-zeroes": True,
        # The guest gets its I/O error. QEMU's default stops the whole VM where the host's disk is full.
        "werror": "report",
        "rerror": "report",
    }
    device |= thread_properties(disk)
    if disk.serial is not None:
        device["serial"] = disk.serial
    if limiter is not None:
        device["request-merging"] = False  # each of the guest's requests counts
    objects = [*_own_limiter(disk, limiter), *thread_objects(disk)]
    return Parts(fdsets=fdsets, objects=objects, blockdevs=[node], devices=[device])


def overlay_node(disk: DiskConfig, image: Image, fdset: FdSet) -> Properties:
    """Describe `image`, an overlay for `disk` that is above nothing yet, but for its name."""
    node = _format_node(disk, image, [fdset])
    return node | {"discard": "unmap" if disk.sparse else "ignore"}


def _fdsets(image: Image, first: int) -> list[FdSet]:
    """Return a set for each image of the chain, and more for what QEMU must have besides."""
    fdsets = [FdSet(each.fd, set_id) for set_id, each in enumerate(image.chain(), start=first)]
    if image.extents is None:
        return fdsets
    # The image itself is not read, but it is what the lock sits on.
    text = FdSet(image.extents.text_fd, first + len(fdsets))
    return [text, *fdsets, *(FdSet(each.fd, each.set_id) for each in image.extents.opened)]


def _own_limiter(disk: DiskConfig, limiter: str | None) -> list[Properties]:
    """Describe the throttle group that is the disk's alone, if it has one."""
    if limiter is None or disk.rate_limiter_config is None:
        return []
    return [throttle_group(limiter, disk.rate_limiter_config)]


def _throttle_node(limiter: str, below: Properties) -> Properties:
    shared: Properties = {name: below[name] for name in ("read-only", "cache", "discard") if name in below}
    return {"driver": "throttle", "throttle-group": limiter, **shared, "file": below}


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
    if image.extents is not None:
        return _text_node(fdset)
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


def _text_node(fdset: FdSet) -> Properties:
    """Describe the text that names the extents. It lies in memory, which no cache need be bypassed for."""
    return {
        "driver": "file",
        "filename": fdset.path,
        "locking": "off",
        "read-only": False,
        "cache": {"direct": False, "no-flush": False},
    }


def _lock(image: Image, granularity: LockGranularity, size_bytes: int) -> None:
    length = None if granularity is LockGranularity.FULL else size_bytes
    try:
        lock_file(image.fd, path=image.path, write=not image.readonly, size_bytes=length)
    except LockConflict as error:
        raise ImageLocked from error
    except LockError as error:
        raise ImageLockError from error
