"""Guest RAM and its zones."""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.number import MIB, U32, U64
from cloudvmm.config.queue import is_power_of_two

# The zone that all RAM is in where the user defined none; also the id of its virtio-mem device.
DEFAULT_ZONE_ID: Final = "mem0"


class HotplugMethod(enum.Enum):
    ACPI = "Acpi"
    VIRTIO_MEM = "VirtioMem"


class MemoryZoneConfig(msgspec.Struct, kw_only=True):
    id: str
    size: U64
    file: str | None = None
    shared: bool = False
    hugepages: bool = False
    hugepage_size: U64 | None = None
    host_numa_node: U32 | None = None
    hotplug_size: U64 | None = None
    hotplugged_size: U64 | None = None
    prefault: bool = False
    reserve: bool = False
    mergeable: bool = False


class MemoryConfig(msgspec.Struct, kw_only=True):
    """Sizes are bytes. `size` is 0 where zones are used."""

    size: U64
    mergeable: bool = False
    hotplug_method: HotplugMethod = HotplugMethod.ACPI
    hotplug_size: U64 | None = None
    hotplugged_size: U64 | None = None
    shared: bool = False
    hugepages: bool = False
    hugepage_size: U64 | None = None
    prefault: bool = False
    reserve: bool = False
    zones: list[MemoryZoneConfig] | None = None
    thp: bool = True


DEFAULT_MEMORY_SIZE_BYTES = 512 * MIB


class HugePageSizeWithoutHugePages(ValidationError):
    """Huge page size specified but huge pages not enabled"""


class InvalidHugePageSize(ValidationError):
    def __init__(self, size: int) -> None:
        super().__init__(f"Huge page size is not power of 2: {size}")


class InvalidSharedMemoryWithMergeable(ValidationError):
    """Invalid to set both 'mergeable' and 'shared' for memory"""


def check_memory(memory: MemoryConfig) -> None:
    """Raise the first rule that the memory or one of its zones breaks."""
    _check_hugepages(memory)
    _check_sharing(memory)
    for zone in memory.zones or ():
        _check_sharing(zone)
        _check_hugepages(zone)


def _check_hugepages(region: MemoryConfig | MemoryZoneConfig) -> None:
    if region.hugepage_size is None:
        return
    if not region.hugepages:
        raise HugePageSizeWithoutHugePages
    if not is_power_of_two(region.hugepage_size):
        raise InvalidHugePageSize(region.hugepage_size)


def _check_sharing(region: MemoryConfig | MemoryZoneConfig) -> None:
    if region.shared and region.mergeable:
        raise InvalidSharedMemoryWithMergeable


def total_size_bytes(memory: MemoryConfig) -> int:
    """Boot RAM, zones, and what has been plugged since."""
    return memory.size + sum(zone.size for zone in memory.zones or ()) + hotplugged_size_bytes(memory)


def hotplugged_size_bytes(memory: MemoryConfig) -> int:
    return (memory.hotplugged_size or 0) + sum(zone.hotplugged_size or 0 for zone in memory.zones or ())


def is_backed_by_shared_memory(memory: MemoryConfig) -> bool:
    """Whether another process can map the guest's RAM."""
    if memory.shared or memory.hugepages:
        return True
    if memory.size != 0 or memory.zones is None:
        return False
    return all(zone.shared or zone.hugepages for zone in memory.zones)
