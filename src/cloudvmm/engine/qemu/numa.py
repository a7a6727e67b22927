"""NUMA nodes of the guest: which pieces of RAM and which vCPUs each has, and how far they are apart.

QEMU gives a node one piece of RAM, and RAM in several pieces needs a node for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from cloudvmm.config.numa import NumaConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import NotSupportedYet
from cloudvmm.engine.qemu.memory import RAM_ID, Ram, merged, rams_of
from cloudvmm.engine.qemu.name import part_id

_REMOTE_DISTANCE: Final = 20


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """`ram` is the QEMU id of its RAM, None where it has none; `zones` are the ids of the zones in it."""

    number: int
    ram: str | None
    zones: list[str]
    vcpus: list[int]
    distances: dict[int, int]


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """`rams` are the pieces of RAM by their QEMU ids; without `nodes` there is one piece, for all."""

    rams: dict[str, Ram]
    nodes: list[Node]

    @property
    def size(self) -> int:
        return sum(ram.size for ram in self.rams.values())

    @property
    def hotplug_size(self) -> int:
        return sum(ram.hotplug_size for ram in self.rams.values())

    def node_of(self, zone_id: str) -> int:
        """Return the number of the node that the zone is in."""
        return next((node.number for node in self.nodes if zone_id in node.zones), 0)


def memory_of(vm_config: VmConfig) -> Memory:
    """Return what RAM `vm_config` describes, and in which nodes it is.

    :raises MemoryConfigError: it contradicts itself.
    :raises NotSupportedYet: QEMU has no such nodes.
    """
    rams = rams_of(vm_config.memory)
    if vm_config.numa:
        return _in_nodes(rams, vm_config.numa, vm_config.cpus.max_vcpus)
    rams = merged(rams)
    if len(rams) == 1:
        return Memory(rams={RAM_ID: rams[0]}, nodes=[])
    nodes = [NumaConfig(guest_numa_id=number, memory_zones=[ram.zone_id]) for number, ram in enumerate(rams)]
    return _in_nodes(rams, nodes, vm_config.cpus.max_vcpus)


def numa_arguments(nodes: Iterable[Node]) -> list[str]:
    """Return the options that make `nodes`."""
    arguments: list[str] = []
    for node in nodes:
        memory = "" if node.ram is None else f",memdev={node.ram}"
        vcpus = "".join(f",cpus={vcpu}" for vcpu in node.vcpus)
        arguments += ["-numa", f"node,nodeid={node.number}{memory}{vcpus}"]
    for node in nodes:
        for other, distance in node.distances.items():
            arguments += ["-numa", f"dist,src={node.number},dst={other},val={distance}"]
    return arguments


def _in_nodes(rams: list[Ram], configs: list[NumaConfig], vcpus: int) -> Memory:
    _check_nodes(configs, rams)
    named = {ram.zone_id: (part_id(ram.zone_id, "ram"), ram) for ram in rams}
    left = sorted(set(range(vcpus)).difference(*(config.cpus or () for config in configs)))
    distances = _distances(configs)
    nodes = []
    for config in sorted(configs, key=lambda each: each.guest_numa_id):
        number, zones = config.guest_numa_id, config.memory_zones or []
        given = [vcpu for vcpu in config.cpus or () if vcpu < vcpus]
        nodes.append(
            Node(
                number=number,
                ram=named[zones[0]][0] if zones else None,
                zones=zones,
                vcpus=given + (left if number == 0 else []),
                distances=distances[number],
            )
        )
    return Memory(rams=dict(named.values()), nodes=nodes)


def _distances(configs: list[NumaConfig]) -> dict[int, dict[int, int]]:
    """Fill in what is not said as the reference does: a node is at 10 of itself, and at 20 of another."""
    numbers = sorted(config.guest_numa_id for config in configs)
    said = {
        (config.guest_numa_id, each.destination): each.distance
        for config in configs
        for each in config.distances or ()
    }
    return {
        source: {
            target: said.get((source, target), said.get((target, source), _REMOTE_DISTANCE))
            for target in numbers
            if target != source
        }
        for source in numbers
    }


def _check_nodes(configs: list[NumaConfig], rams: list[Ram]) -> None:
    for reason in _missing(configs, rams):
        raise NotSupportedYet(f"QEMU has no such NUMA nodes: {reason}")


def _missing(configs: list[NumaConfig], rams: list[Ram]) -> Iterator[str]:
    numbers = sorted(config.guest_numa_id for config in configs)
    if numbers != list(range(len(numbers))):
        yield "their numbers must go from 0 on without a gap"
    for config in configs:
        if config.device_id is not None:
            yield "a device cannot be one"
        if len(config.memory_zones or ()) > 1:
            yield f"node {config.guest_numa_id} can have one memory zone only"
    placed = {zone for config in configs for zone in config.memory_zones or ()}
    for ram in rams:
        if ram.zone_id not in placed:
            yield f"the memory zone {ram.zone_id} is in none of them"
