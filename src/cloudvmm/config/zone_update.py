"""Memory zones that a restored or received VM gets on other NUMA nodes of the host."""

from __future__ import annotations

from collections.abc import Sequence

from cloudvmm.config.operation import MemoryZoneUpdate
from cloudvmm.config.vm import VmConfig
from cloudvmm.errors import VmmError


class ZoneUpdateError(VmmError):
    """Root of what is wrong with an update."""


class NoZones(ZoneUpdateError):
    """No zones specified in original config"""


class SharedZoneBackedByFile(ZoneUpdateError):
    def __init__(self, zone_id: str) -> None:
        super().__init__(
            f'Zone with ID "{zone_id}" is a shared zone backed by a regular file and thus cannot be bound to '
            "a node"
        )


class ZoneNotFound(ZoneUpdateError):
    def __init__(self, zone_id: str) -> None:
        super().__init__(f'Zone ID "{zone_id}" wasn\'t contained in original config')


class MultipleUpdates(ZoneUpdateError):
    def __init__(self, zone_id: str) -> None:
        super().__init__(f'Multiple updates were specified for memory zone with ID "{zone_id}"')


def update_zones(vm_config: VmConfig, updates: Sequence[MemoryZoneUpdate]) -> None:
    """Write the host nodes of `updates` into `vm_config`; all or none.

    :raises ZoneUpdateError: there is no such zone, or it cannot be bound to a node.
    """
    if not updates:
        return
    if vm_config.memory.zones is None:
        raise NoZones
    zones = {zone.id: zone for zone in vm_config.memory.zones}
    seen: set[str] = set()
    for update in updates:
        if update.id in seen:
            raise MultipleUpdates(update.id)
        seen.add(update.id)
        if update.id not in zones:
            raise ZoneNotFound(update.id)
        if zones[update.id].shared and zones[update.id].file is not None:
            raise SharedZoneBackedByFile(update.id)
    for update in updates:
        zones[update.id].host_numa_node = update.host_numa_node
