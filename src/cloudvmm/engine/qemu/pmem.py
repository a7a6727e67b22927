"""Persistent memory: a file that the guest reads and writes as memory and has as a block device.

Its size is looked at by control, before: a multiple of 2 MiB, which a folder does not have by itself.
"""

from __future__ import annotations

import os

from cloudvmm.config.device import PmemConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.mapped import MappedBacking, mapped_object, open_mapped
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts
from cloudvmm.engine.qemu.seat import Seat


class PmemOpenError(DeviceError):
    """Cannot open persistent memory file"""


class PmemResizeError(DeviceError):
    """Cannot set persistent memory file size"""


def open_pmem(pmem: PmemConfig) -> MappedBacking:
    """Open the file of `pmem`, or one without a name in the folder that it names. The caller owns the result.

    :raises DeviceError: it cannot be had; the cause tells why.
    """
    access = os.O_RDONLY if pmem.discard_writes else os.O_RDWR
    try:
        is_folder = os.path.isdir(pmem.file)
        # Without a name, for writing only: the kernel refuses a folder together with `discard_writes`.
        flags = os.O_TMPFILE if is_folder else os.O_NONBLOCK
        fd = os.open(pmem.file, access | flags | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:
        raise PmemOpenError from error
    if is_folder:
        _set_size(fd, pmem.size or 0)
    backing = open_mapped(id_of(pmem.id), fd, size=pmem.size, is_shared=not pmem.discard_writes)
    backing.stays = "QEMU cannot unplug persistent memory"
    # Its queue stays behind: a guest that went on would wait for its next flush for ever.
    backing.unsaved = "QEMU does not save persistent memory devices"
    return backing


def pmem_parts(pmem: PmemConfig, backing: MappedBacking, seat: Seat) -> Parts:
    """Describe `pmem` on its open file."""
    memory = mapped_object(backing)
    device = {
        "driver": "virtio-pmem-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "memdev": memory["id"],
    }
    return Parts(objects=[memory], devices=[device])


def _set_size(fd: int, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise PmemResizeError from error
