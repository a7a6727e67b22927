"""`--memory` and `--memory-zone`."""

from __future__ import annotations

from collections.abc import Sequence

from cloudvmm.config.memory import (
    DEFAULT_MEMORY_SIZE_BYTES,
    HotplugMethod,
    MemoryConfig,
    MemoryZoneConfig,
)
from cloudvmm.options.schema import Key, Schema
from cloudvmm.options.value import BYTE_SIZED, PATH, TEXT, TOGGLE, U32, choice

_MERGEABLE = Key("mergeable", TOGGLE, "Whether the host may merge equal pages (KSM)")
_HOTPLUG_SIZE = Key("hotplug_size", BYTE_SIZED, "Memory that can be added later")
_HOTPLUGGED_SIZE = Key("hotplugged_size", BYTE_SIZED, "Of that, what is there from the start (virtio-mem)")
_SHARED = Key("shared", TOGGLE, "Whether other processes can map the memory; vhost-user needs it")
_HUGEPAGES = Key("hugepages", TOGGLE, "Whether to use huge pages")
_HUGEPAGE_SIZE = Key(
    "hugepage_size", BYTE_SIZED, "Size of a huge page, a power of two; the host's if not given"
)
_PREFAULT = Key("prefault", TOGGLE, "Whether to take all memory from the host at the start")
_RESERVE = Key("reserve", TOGGLE, "Whether the host sets the memory aside")

MEMORY = Schema(
    "--memory",
    MemoryConfig,
    Key("size", BYTE_SIZED, "Memory at boot; 0 where there are zones", default=DEFAULT_MEMORY_SIZE_BYTES),
    Key("file", PATH, "Accepted, and without effect", is_old=True),
    _MERGEABLE,
    Key(
        "hotplug_method",
        choice({"acpi": HotplugMethod.ACPI, "virtio-mem": HotplugMethod.VIRTIO_MEM}),
        "How memory is added to a running guest",
    ),
    _HOTPLUG_SIZE,
    _HOTPLUGGED_SIZE,
    _SHARED,
    _HUGEPAGES,
    _HUGEPAGE_SIZE,
    _PREFAULT,
    _RESERVE,
    Key("thp", TOGGLE, "Whether to use transparent huge pages"),
)

MEMORY_ZONE = Schema(
    "--memory-zone",
    MemoryZoneConfig,
    Key("id", TEXT, "Identifier of the zone", missing="id missing"),
    Key("size", BYTE_SIZED, "Memory at boot", default=DEFAULT_MEMORY_SIZE_BYTES),
    Key("file", PATH, "File behind the zone"),
    _SHARED,
    _HUGEPAGES,
    _HUGEPAGE_SIZE,
    Key("host_numa_node", U32, "NUMA node of the host that the zone lies on"),
    _HOTPLUG_SIZE,
    _HOTPLUGGED_SIZE,
    _PREFAULT,
    _RESERVE,
    _MERGEABLE,
)


def parse_memory(text: str, zones: Sequence[str] | None = None) -> MemoryConfig:
    """Read `--memory`, and each use of `--memory-zone`.

    A zone that does not say whether it is mergeable is what the memory is. The key `file` is
    accepted and has no effect.

    :raises OptionError: when a text is not what its flag takes.
    """
    members = MEMORY.members(text)
    members.pop("file", None)
    memory = MemoryConfig(**members)
    if zones is not None:
        memory.zones = [parse_memory_zone(zone, is_mergeable=memory.mergeable) for zone in zones]
    return memory


def parse_memory_zone(text: str, *, is_mergeable: bool = False) -> MemoryZoneConfig:
    """:raises OptionError: when `text` is not what `--memory-zone` takes."""
    members = MEMORY_ZONE.members(text)
    members.setdefault("mergeable", is_mergeable)
    return MemoryZoneConfig(**members)


def format_memory(memory: MemoryConfig) -> tuple[str, list[str] | None]:
    """Return what `parse_memory` takes: the text of `--memory`, and one of `--memory-zone` for each zone.

    :raises Unprintable: no such texts give `memory`.
    """
    zones = None
    if memory.zones is not None:
        zones = [format_memory_zone(zone, is_mergeable=memory.mergeable) for zone in memory.zones]
    return MEMORY.format(memory, lambda text: parse_memory(text, zones)), zones


def format_memory_zone(zone: MemoryZoneConfig, *, is_mergeable: bool = False) -> str:
    """:raises Unprintable: no `--memory-zone` gives `zone` where the memory `is_mergeable`."""

    def parse(text: str) -> MemoryZoneConfig:
        return parse_memory_zone(text, is_mergeable=is_mergeable)

    if zone.mergeable == is_mergeable:
        return MEMORY_ZONE.format(zone, parse, mergeable=None)
    return MEMORY_ZONE.format(zone, parse, always=("mergeable",))
