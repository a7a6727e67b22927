"""Guest NUMA nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.number import U8, U16, U32
from cloudvmm.config.pci import InvalidPciSegment, num_pci_segments

if TYPE_CHECKING:
    from cloudvmm.config.vm import VmConfig


class NumaDistance(msgspec.Struct, kw_only=True):
    destination: U32 = 0
    distance: U8 = 0


class NumaConfig(msgspec.Struct, kw_only=True):
    guest_numa_id: U32
    cpus: list[U32] | None = None
    distances: list[NumaDistance] | None = None
    memory_zones: list[str] | None = None
    pci_segments: list[U16] | None = None
    device_id: str | None = None


class InvalidNumaConfig(ValidationError):
    def __init__(self, why: str) -> None:
        super().__init__(f"Invalid NUMA configuration: {why}")


class MemoryZoneReused(ValidationError):
    def __init__(self, zone_id: str, first_node: int, second_node: int) -> None:
        super().__init__(
            f"Memory zone: {zone_id} belongs to multiple NUMA nodes: {first_node} and {second_node}"
        )


class DefaultPciSegmentInvalidNode(ValidationError):
    def __init__(self, node: int) -> None:
        super().__init__(f"Default PCI segment assigned to non-zero NUMA node {node}")


class PciSegmentReused(ValidationError):
    def __init__(self, segment: int, first_node: int, second_node: int) -> None:
        super().__init__(
            f"PCI segment: {segment} belongs to multiple NUMA nodes {first_node} and {second_node}"
        )


def check_numa(vm: VmConfig) -> None:
    """Raise the first rule that the nodes break, each alone or together."""
    node_of_zone: dict[str, int] = {}
    node_of_segment: dict[int, int] = {}
    for node in vm.numa or ():
        _check_shape(node)
        for zone_id in node.memory_zones or ():
            if zone_id in node_of_zone:
                raise MemoryZoneReused(zone_id, node_of_zone[zone_id], node.guest_numa_id)
            node_of_zone[zone_id] = node.guest_numa_id
        for segment in node.pci_segments or ():
            _check_segment(segment, node, vm)
            if segment in node_of_segment:
                raise PciSegmentReused(segment, node_of_segment[segment], node.guest_numa_id)
            node_of_segment[segment] = node.guest_numa_id


def _check_segment(segment: int, node: NumaConfig, vm: VmConfig) -> None:
    if segment >= num_pci_segments(vm):
        raise InvalidPciSegment(segment)
    if segment == 0 and node.guest_numa_id != 0:
        raise DefaultPciSegmentInvalidNode(node.guest_numa_id)


def _check_shape(node: NumaConfig) -> None:
    """A node is a generic initiator, or it has CPUs, memory, or both."""
    has_cpus_or_memory = node.cpus is not None or node.memory_zones is not None
    if node.device_id is not None:
        if has_cpus_or_memory:
            raise InvalidNumaConfig(
                "device_id in numa config is mutually exclusive with cpus and memory_zones"
            )
        if not node.device_id:
            raise InvalidNumaConfig("device_id in numa config cannot be empty")
        return
    if not has_cpus_or_memory:
        raise InvalidNumaConfig("numa config must specify either device_id or cpus/memory_zones")
    if node.cpus is not None and not node.cpus:
        raise InvalidNumaConfig("cpus list in numa config cannot be empty")
    if node.cpus is None and not node.memory_zones:
        raise InvalidNumaConfig("memory_zones in numa config cannot be empty")
