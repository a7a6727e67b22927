"""Memory that a guest takes and gives back as it is asked to: the virtio-mem device of a zone.

Like the RAM it is a memfd that QEMU shares with us, or private where KSM is to merge it. Nothing is set aside
for what the guest has not taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from cloudvmm.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig
from cloudvmm.engine.qemu.memory import RamBacking, ram_backend, rams_of
from cloudvmm.engine.qemu.name import part_id, qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.seat import Seat


class ZoneBacking(RamBacking, kw_only=True):
    """`ram` is all that the guest can have of it; `requested_bytes` are what it is to have at first."""

    requested_bytes: int


def zones_of(memory: MemoryConfig) -> dict[str, ZoneBacking]:
    """Return what is behind every virtio-mem device, by zone id; nothing is opened yet."""
    if memory.hotplug_method is not HotplugMethod.VIRTIO_MEM:
        return {}
    sources: Sequence[MemoryConfig | MemoryZoneConfig] = memory.zones or [memory]
    return {
        ram.zone_id: ZoneBacking(
            device_id=ram.zone_id,
            ram=ram.resized(ram.hotplug_size),
            requested_bytes=source.hotplugged_size or 0,
        )
        for ram, source in zip(rams_of(memory), sources, strict=True)
        if ram.hotplug_size
    }


def zone_parts(backing: ZoneBacking, seat: Seat, *, node: int) -> Parts:
    """Describe the virtio-mem device of a zone, whose memory is in the guest's NUMA node `node`."""
    memory = {**ram_backend(backing.ram, fd=backing.fd), "id": part_id(backing.device_id, "mem")}
    device: Properties = {
        "driver": "virtio-mem-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "memdev": memory["id"],
        "node": node,
        "requested-size": backing.requested_bytes,
    }
    return Parts(objects=[memory | {"reserve": False}], devices=[device])
