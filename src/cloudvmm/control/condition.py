"""What must be so before a VM can be built, beyond the rules of `config`: the reference's own checks.

They are made in this order and give HTTP 500: memory, then the rules of the config (which `config` has, and
which give 400), then NUMA, vCPUs, devices. Only files are looked at, never an engine.
Reference: config.md section 13.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from cloudvmm.config.device import PmemConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import DEFAULT_ZONE_ID, HotplugMethod, MemoryConfig, MemoryZoneConfig
from cloudvmm.config.numa import NumaConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.error import (
    CreateVirtioMem,
    DirectoryAsBackingFileForMemory,
    DuplicateZoneId,
    GetFileSystemBlockSize,
    InvalidHotplugMethodWithMemoryZones,
    InvalidHotplugSize,
    InvalidMemoryParameters,
    InvalidNumaNodes,
    InvalidSharedMemoryZoneWithHostNuma,
    MaximumVcpusExceeded,
    MisalignedMemorySize,
    MissingMemoryZones,
    NoDiskPath,
    PmemFileOpen,
    PmemSizeNotAligned,
    PmemWithDirectorySizeMissing,
    ZoneHotplugSizeNotAligned,
)
from cloudvmm.control.ram import ram_of

PMEM_ALIGNMENT_BYTES: Final = 2 * MIB
ZONE_HOTPLUG_ALIGNMENT_BYTES: Final = 128 * MIB


def check_memory(memory: MemoryConfig) -> None:
    """:raises RamRefused: the members contradict each other, or a size fits no page."""
    if memory.size:
        if memory.zones is not None:
            raise InvalidMemoryParameters
        _check_hotplugged(memory, memory.hotplug_method)
        _check_page_size(memory, None)
    else:
        if not memory.zones:
            raise MissingMemoryZones
        for zone in memory.zones:
            _check_zone(zone, memory.hotplug_method)
        _check_zone_files(memory.zones)
    regions: list[MemoryConfig | MemoryZoneConfig] = [memory] if memory.size else [*(memory.zones or ())]
    if any(region.hotplug_size == 0 for region in regions):
        raise InvalidHotplugSize


def check_numa(vm_config: VmConfig) -> None:
    """:raises InvalidNumaNodes: a node is there twice, or names a zone or a node that is not."""
    memory = vm_config.memory
    zones = {DEFAULT_ZONE_ID} if memory.size else {zone.id for zone in memory.zones or ()}
    nodes = {node.guest_numa_id for node in vm_config.numa or ()}
    seen: set[int] = set()
    for node in vm_config.numa or ():
        if node.guest_numa_id in seen or not zones.issuperset(node.memory_zones or ()):
            raise InvalidNumaNodes
        seen.add(node.guest_numa_id)
        _check_distances(node, nodes)


def check_vcpus(vm_config: VmConfig, limit: int) -> None:
    """:raises MaximumVcpusExceeded: the engine cannot give so many."""
    if vm_config.cpus.max_vcpus > limit:
        raise MaximumVcpusExceeded(vm_config.cpus.max_vcpus, limit)


def check_devices(vm_config: VmConfig) -> None:
    """:raises DeviceRefused: a device lacks something without which no engine could make it."""
    for device in (*(vm_config.disks or ()), *(vm_config.pmem or ())):
        check_device(device)
    for zone in ram_of(vm_config.memory).zones.values():
        if zone.hotplug_bytes % ZONE_HOTPLUG_ALIGNMENT_BYTES:
            raise CreateVirtioMem from ZoneHotplugSizeNotAligned(ZONE_HOTPLUG_ALIGNMENT_BYTES)


def check_device(device: PciDevice) -> None:
    """:raises DeviceRefused: as `check_devices`."""
    if isinstance(device, DiskConfig) and device.path is None and not device.vhost_user:
        raise NoDiskPath
    if isinstance(device, PmemConfig):
        _check_pmem(device)


def _check_zone(zone: MemoryZoneConfig, method: HotplugMethod) -> None:
    if zone.shared and zone.file is not None and zone.host_numa_node is not None:
        raise InvalidSharedMemoryZoneWithHostNuma
    if zone.hotplug_size is not None and method is HotplugMethod.ACPI:
        raise InvalidHotplugMethodWithMemoryZones
    _check_hotplugged(zone, method)


def _check_hotplugged(region: MemoryConfig | MemoryZoneConfig, method: HotplugMethod) -> None:
    if region.hotplugged_size is None:
        return
    if region.hotplug_size is None or region.hotplugged_size > region.hotplug_size:
        raise InvalidMemoryParameters
    if method is HotplugMethod.ACPI:
        raise InvalidMemoryParameters


def _check_zone_files(zones: list[MemoryZoneConfig]) -> None:
    seen: set[str] = set()
    for zone in zones:
        _check_page_size(zone, zone.file)
        if zone.id in seen:
            raise DuplicateZoneId
        seen.add(zone.id)
        if zone.file is not None and os.path.isdir(zone.file):
            raise DirectoryAsBackingFileForMemory


def _check_page_size(region: MemoryConfig | MemoryZoneConfig, file: str | None) -> None:
    page_bytes = os.sysconf("SC_PAGESIZE")
    if region.hugepages and region.hugepage_size:
        page_bytes = region.hugepage_size
    elif file is not None:
        try:
            page_bytes = max(page_bytes, os.statvfs(file).f_bsize)
        except (OSError, ValueError) as error:
            raise GetFileSystemBlockSize from error
    if region.size % page_bytes:
        raise MisalignedMemorySize


def _check_distances(node: NumaConfig, nodes: set[int]) -> None:
    targets = [distance.destination for distance in node.distances or ()]
    if len(targets) != len(set(targets)) or not nodes.issuperset(targets):
        raise InvalidNumaNodes


def _check_pmem(pmem: PmemConfig) -> None:
    try:
        found = os.stat(pmem.file)
    except (OSError, ValueError) as error:
        raise PmemFileOpen from error
    if stat.S_ISDIR(found.st_mode) and pmem.size is None:
        raise PmemWithDirectorySizeMissing
    if (found.st_size if pmem.size is None else pmem.size) % PMEM_ALIGNMENT_BYTES:
        raise PmemSizeNotAligned
