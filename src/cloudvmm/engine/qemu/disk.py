"""Disks: a virtio-blk device on a block node made of descriptors that are open already."""

from __future__ import annotations

from typing import Any

from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.engine.qemu.image import Image
from cloudvmm.engine.qemu.name import node_name, qdev_id
from cloudvmm.engine.qemu.parts import FdSet, Parts, Properties
from cloudvmm.engine.qemu.slot import place

# A fixed VHD is raw data with a footer behind it.
_DRIVERS = {
    ImageType.RAW: "raw",
    ImageType.FIXED_VHD: "raw",
    ImageType.QCOW2: "qcow2",
    ImageType.VHDX: "vhdx",
}


def disk_parts(
    slots: dict[str, int],
    disk: DiskConfig,
    *,
    disk_id: str,
    image: Image,
    fdsets: list[FdSet],
    boot_index: int | None = None,
) -> Parts:
    """Describe `disk`; `fdsets` are the descriptors of the chain of `image`, top first.

    A firmware looks at what has a `boot_index`, lowest first.
    """
    node = {"node-name": node_name(disk_id), **_format_node(disk, image, fdsets)}
    if not disk.readonly:
        node["discard"] = "unmap" if disk.sparse else "ignore"
    device: Properties = {
        "driver": "virtio-blk-pci",
        "id": qdev_id(disk_id),
        **place(slots, disk_id),
        "disable-legacy": "on",
        "drive": node["node-name"],
        "num-queues": disk.num_queues,
        "queue-size": disk.queue_size,
        **({} if boot_index is None else {"bootindex": boot_index}),
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
