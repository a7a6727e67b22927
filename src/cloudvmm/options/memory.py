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

MEMORY = Schema(
    "--memory",
    Key("size", BYTE_SIZED, default=DEFAULT_MEMORY_SIZE_BYTES),
    Key("file", PATH),
    Key("mergeable", TOGGLE),
    Key("hotplug_method", choice({"acpi": HotplugMethod.ACPI, "virtio-mem": HotplugMethod.VIRTIO_MEM})),
    Key("hotplug_size", BYTE_SIZED),
    Key("hotplugged_size", BYTE_SIZED),
    Key("shared", TOGGLE),
    Key("hugepages", TOGGLE),
    Key("hugepage_size", BYTE_SIZED),
    Key("prefault", TOGGLE),
    Key("reserve", TOGGLE),
    Key("thp", TOGGLE),
)

MEMORY_ZONE = Schema(
    "--memory-zone",
    Key("id", TEXT, missing="id missing"),
    Key("size", BYTE_SIZED, default=DEFAULT_MEMORY_SIZE_BYTES),
    Key("file", PATH),
    Key("shared", TOGGLE),
    Key("hugepages", TOGGLE),
    Key("hugepage_size", BYTE_SIZED),
    Key("host_numa_node", U32),
    Key("hotplug_size", BYTE_SIZED),
    Key("hotplugged_size", BYTE_SIZED),
    Key("prefault", TOGGLE),
    Key("reserve", TOGGLE),
    Key("mergeable", TOGGLE),
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
