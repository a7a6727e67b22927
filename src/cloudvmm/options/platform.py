"""`--platform`, `--pci-segment`, `--numa` and `--landlock-rules`."""

from __future__ import annotations

from cloudvmm.config.landlock import LandlockConfig
from cloudvmm.config.numa import NumaConfig, NumaDistance
from cloudvmm.config.pci import PciSegmentConfig
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.options.error import InvalidValue, ParseError
from cloudvmm.options.schema import Key, Schema
from cloudvmm.options.value import (
    I32,
    PATH,
    STRING_LIST,
    TEXT,
    TOGGLE,
    U8,
    U16,
    U32,
    parse_u64,
    truncate,
    truncated_integer_list,
    tuple_list,
)

PLATFORM = Schema(
    "--platform",
    Key("num_pci_segments", U16),
    Key("iommu_segments", truncated_integer_list(16)),
    Key("iommu_address_width", U8, member="iommu_address_width_bits"),
    Key("oem_strings", STRING_LIST),
    Key("iommufd_fd", I32),
    Key("iommufd", TOGGLE),
    Key("vfio_p2p_dma", TOGGLE),
    Key("system_manufacturer", TEXT),
    Key("system_product_name", TEXT),
    Key("system_version", TEXT),
    Key("system_serial_number", TEXT),
    Key("system_uuid", TEXT),
    Key("system_sku_number", TEXT),
    Key("system_family", TEXT),
    Key("chassis_asset_tag", TEXT),
    Key("serial_number", TEXT),
    Key("uuid", TEXT),
)

PCI_SEGMENT = Schema(
    "--pci-segment",
    Key("pci_segment", U16),
    Key("mmio32_aperture_weight", U32),
    Key("mmio64_aperture_weight", U32),
)

NUMA = Schema(
    "--numa",
    Key(
        "guest_numa_id",
        U32,
        missing_cause=lambda: InvalidValue("guest_numa_id is required for all NUMA nodes"),
    ),
    Key("cpus", truncated_integer_list(32)),
    Key("distances", tuple_list(parse_u64, parse_u64, syntax="[<node>@<distance>]")),
    Key("device_id", TEXT),
    Key("memory_zones", STRING_LIST),
    Key("pci_segments", truncated_integer_list(16)),
)

_LANDLOCK_MISSING = "path/access field missing"
LANDLOCK_RULES = Schema(
    "--landlock-rules",
    Key("path", PATH, missing=_LANDLOCK_MISSING),
    Key("access", TEXT, missing=_LANDLOCK_MISSING),
)


def parse_platform(text: str) -> PlatformConfig:
    """Read `--platform`. A descriptor in `iommufd_fd` turns `iommufd` on unless that is given, too.

    :raises OptionError: when `text` is not what `--platform` takes.
    """
    members = PLATFORM.members(text)
    for alias in ("serial_number", "uuid"):
        if alias in members:
            members.setdefault(f"system_{alias}", members.pop(alias))
    members.setdefault("iommufd", "iommufd_fd" in members)
    return PlatformConfig(**members)


def parse_pci_segment(text: str) -> PciSegmentConfig:
    """:raises OptionError: when `text` is not what `--pci-segment` takes."""
    return PciSegmentConfig(**PCI_SEGMENT.members(text))


def parse_numa(text: str) -> NumaConfig:
    """:raises OptionError: when `text` is not what `--numa` takes."""
    members = NUMA.members(text)
    if "distances" in members:
        members["distances"] = [
            NumaDistance(destination=truncate(node, 32), distance=truncate(distance, 8))
            for node, distance in members["distances"]
        ]
    if "device_id" in members and ("cpus" in members or "memory_zones" in members):
        raise ParseError("--numa") from InvalidValue(
            "device_id in numa config cannot be used with cpus or memory zones"
        )
    return NumaConfig(**members)


def parse_landlock_rule(text: str) -> LandlockConfig:
    """:raises OptionError: when `text` is not what `--landlock-rules` takes."""
    members = LANDLOCK_RULES.members(text)
    if len(members["access"]) > 2:
        raise ParseError("--landlock-rules") from InvalidValue(members["access"])
    return LandlockConfig(**members)
