"""Guest RAM and its zones."""

from __future__ import annotations

import enum

import msgspec

from cloudvmm.config.number import MIB, U32, U64


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
