"""Shared memory: a file of the host that the guest has as the memory of a PCI device."""

from __future__ import annotations

import os
from typing import Final

from cloudvmm.config.device import IvshmemConfig
from cloudvmm.engine.base import DeviceError, MachineSpec
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.mapped import MappedBacking, mapped_object, open_mapped
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts
from cloudvmm.engine.qemu.slot import place

IVSHMEM_ID: Final = "__ivshmem"


class IvshmemOpenError(DeviceError):
    """The file of the shared memory cannot be opened"""


def open_ivshmem(ivshmem: IvshmemConfig) -> MappedBacking:
    """Open the file of `ivshmem`. The caller owns the result.

    :raises DeviceError: it cannot be had; the cause tells why.
    """
    try:
        fd = os.open(ivshmem.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise IvshmemOpenError from error
    return open_mapped(ivshmem.id or IVSHMEM_ID, fd, size=ivshmem.size)


def ivshmem_parts(spec: MachineSpec, backings: dict[str, Backing]) -> Parts:
    """Describe the shared memory: PCI 1af4:1110, the memory behind its BAR 2."""
    ivshmem = spec.vm_config.ivshmem
    if ivshmem is None:
        return Parts()
    device_id = ivshmem.id or IVSHMEM_ID
    backing = backings[device_id]
    assert isinstance(backing, MappedBacking)
    memory = mapped_object(backing)
    device = {
        "driver": "ivshmem-plain",
        "id": qdev_id(device_id),
        **place(spec.slots, device_id),
        "memdev": memory["id"],
        "master": "on",  # the memory goes where the guest goes
    }
    return Parts(objects=[memory], devices=[device])
