"""RAM and vCPUs of a booted VM: which new size may be asked for, and what it means for the machine.

Pure arithmetic, no engine. Sizes are bytes. Reference: lifecycle.md section 10, config.md section 13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Final

import msgspec

from cloudvmm.api.error import VcpuRemovalPending
from cloudvmm.config.memory import DEFAULT_ZONE_ID, HotplugMethod, MemoryConfig
from cloudvmm.config.number import MIB, ByteCount
from cloudvmm.control.error import (
    DesiredVcpuCountExceedsMax,
    DesiredVcpuCountIsZero,
    InsufficientHotplugRam,
    InvalidResizeBelowBootSize,
    InvalidResizeWithMemoryZones,
    InvalidSize,
    MissingVirtioMemHandler,
    NoSlotAvailable,
    ResizeError,
    VirtioMemResizeFail,
    ZoneSizeRefused,
)

MODULES: Final = 8
MODULE_BYTES: Final = 128 * MIB
ZONE_BLOCK_BYTES: Final = 2 * MIB


class Zone(msgspec.Struct, frozen=True):
    """A virtio-mem device: how much it can give, and how much it was last asked to."""

    hotplug_bytes: ByteCount
    requested_bytes: ByteCount


class Ram(msgspec.Struct, frozen=True, kw_only=True):
    """What booted and the sizes of the modules plugged since; what virtio-mem gives is beside it."""

    boot_bytes: ByteCount
    modules: Annotated[list[ByteCount], msgspec.Meta(max_length=MODULES)] = msgspec.field(
        default_factory=list
    )
    room_bytes: ByteCount
    has_user_zones: bool
    zones: dict[str, Zone]

    @property
    def current_bytes(self) -> int:
        """What booted and all modules."""
        return self.boot_bytes + sum(self.modules)

    def check_resizable(self) -> None:
        """:raises InvalidResizeWithMemoryZones: each zone has a size of its own."""
        if self.has_user_zones:
            raise InvalidResizeWithMemoryZones

    def module_bytes(self, desired_bytes: int) -> int:
        """Return the size of the module that takes RAM to `desired_bytes`; 0 where none is needed.

        :raises RamRefused: there is no slot, no room, or no module of that size.
        """
        if desired_bytes <= self.current_bytes:
            return 0
        added_bytes = desired_bytes - self.current_bytes
        if len(self.modules) >= MODULES:
            raise NoSlotAvailable
        if added_bytes % MODULE_BYTES:
            raise InvalidSize
        if self.current_bytes + added_bytes > self.boot_bytes + self.room_bytes:
            raise InsufficientHotplugRam
        return added_bytes

    def with_module(self, added_bytes: int) -> Ram:
        return msgspec.structs.replace(self, modules=[*self.modules, added_bytes])

    def check_zone(self, zone_id: str, requested_bytes: int) -> None:
        """Raise what keeps the virtio-mem device from being asked for `requested_bytes`.

        :raises MissingVirtioMemHandler: the zone has no such device.
        :raises VirtioMemResizeFail: the device cannot give that; its cause's cause tells why.
        """
        zone = self.zones.get(zone_id)
        if zone is None:
            raise MissingVirtioMemHandler
        why = _zone_refusal(zone, requested_bytes)
        if why is not None:
            invalid = ResizeError()
            invalid.__cause__ = ZoneSizeRefused(why)
            raise VirtioMemResizeFail from invalid

    def with_zone(self, zone_id: str, requested_bytes: int) -> Ram:
        zone = Zone(self.zones[zone_id].hotplug_bytes, requested_bytes)
        return msgspec.structs.replace(self, zones={**self.zones, zone_id: zone})


def ram_of(memory: MemoryConfig) -> Ram:
    """Return the RAM of a VM that is built from `memory`."""
    boot_bytes = memory.size or sum(zone.size for zone in memory.zones or ())
    return Ram(
        boot_bytes=boot_bytes,
        room_bytes=memory.hotplug_size or 0,
        has_user_zones=memory.size == 0,
        zones=dict(_virtio_mem_zones(memory)),
    )


def check_above_boot(desired_bytes: int, boot_bytes: int) -> None:
    """:raises InvalidResizeBelowBootSize: virtio-mem cannot take away what booted."""
    if desired_bytes < boot_bytes:
        raise InvalidResizeBelowBootSize(desired_bytes, boot_bytes)


def _virtio_mem_zones(memory: MemoryConfig) -> Iterator[tuple[str, Zone]]:
    if memory.hotplug_method is not HotplugMethod.VIRTIO_MEM:
        return
    if memory.size:
        if memory.hotplug_size:
            yield DEFAULT_ZONE_ID, Zone(memory.hotplug_size, memory.hotplugged_size or 0)
        return
    for zone in memory.zones or ():
        if zone.hotplug_size:
            yield zone.id, Zone(zone.hotplug_size, zone.hotplugged_size or 0)


def _zone_refusal(zone: Zone, requested_bytes: int) -> str | None:
    if requested_bytes == zone.requested_bytes:
        return f"new size {requested_bytes:#x} and requested_size are identical"
    if requested_bytes > zone.hotplug_bytes:
        return f"new size {requested_bytes:#x} is bigger than region_size {zone.hotplug_bytes:#x}"
    if requested_bytes % ZONE_BLOCK_BYTES:
        return f"new size {requested_bytes:#x} is not aligned on block_size {ZONE_BLOCK_BYTES:#x}"
    return None


class GuestRam(msgspec.Struct, frozen=True):
    """What the guest says that it has given back to its balloon, and taken from each virtio-mem device."""

    balloon_bytes: ByteCount = 0
    plugged: dict[str, ByteCount] = msgspec.field(default_factory=dict)

    def actual_bytes(self, configured_bytes: int) -> int:
        return max(0, configured_bytes - self.balloon_bytes) + sum(self.plugged.values())

    def with_zone(self, zone_id: str, plugged_bytes: int) -> GuestRam:
        return GuestRam(self.balloon_bytes, {**self.plugged, zone_id: plugged_bytes})


class Vcpus(msgspec.Struct, frozen=True):
    """`present` counts those that the guest was asked to let go of, too, until it has."""

    present: Annotated[int, msgspec.Meta(ge=1, le=0xFFFF)]
    is_removing: bool = False

    def is_change(self, desired: int, max_vcpus: int) -> bool:
        """Tell whether the machine is to be asked for `desired` vCPUs, or has them.

        :raises VcpuRemovalPending: the guest still has to let go of some.
        :raises VcpusRefused: there cannot be so many, or so few.
        """
        if desired == self.present:
            return False
        if desired == 0:
            raise DesiredVcpuCountIsZero
        if self.is_removing:
            raise VcpuRemovalPending
        if desired > max_vcpus:
            raise DesiredVcpuCountExceedsMax
        return True
