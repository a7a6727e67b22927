"""Memory that a guest takes and gives back as it is asked to: the virtio-mem device of a zone.

Like the RAM it is a memfd that QEMU shares with us, or private where KSM is to merge it. Nothing is set aside
for what the guest has not taken.
"""

from __future__ import annotations

import os

from cloudvmm.config.memory import DEFAULT_ZONE_ID, HotplugMethod, MemoryConfig
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.memory import Ram, open_ram, ram_backend, ram_of
from cloudvmm.engine.qemu.name import part_id, qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.seat import Seat


class ZoneBacking(Backing, kw_only=True):
    """`memory` is all that the guest can have; `requested_bytes` are what it is to have at first."""

    memory: Ram
    requested_bytes: int
    fd: int | None = None

    @property
    def fds(self) -> list[int]:
        return [] if self.fd is None else [self.fd]

    def open(self) -> None:
        """:raises RamError: the kernel has no such pages."""
        self.fd = open_ram(self.memory)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def zones_of(memory: MemoryConfig) -> dict[str, ZoneBacking]:
    """Return what is behind every virtio-mem device, by zone id; nothing is opened yet."""
    if memory.hotplug_method is not HotplugMethod.VIRTIO_MEM:
        return {}
    source = memory.zones[0] if memory.zones else memory
    if not source.hotplug_size:
        return {}
    zone_id = memory.zones[0].id if memory.zones else DEFAULT_ZONE_ID
    ram = ram_of(memory).resized(source.hotplug_size)
    requested_bytes = source.hotplugged_size or 0
    return {zone_id: ZoneBacking(device_id=zone_id, memory=ram, requested_bytes=requested_bytes)}


def zone_parts(backing: ZoneBacking, seat: Seat) -> Parts:
    """Describe the virtio-mem device of a zone."""
    memory = {**ram_backend(backing.memory, fd=backing.fd), "id": part_id(backing.device_id, "mem")}
    device: Properties = {
        "driver": "virtio-mem-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "memdev": memory["id"],
        "node": 0,
        "requested-size": backing.requested_bytes,
    }
    return Parts(objects=[memory | {"reserve": False}], devices=[device])
