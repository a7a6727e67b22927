"""`--platform`, `--pci-segment`, `--numa` and `--landlock-rules`."""

from __future__ import annotations

from cloudvmm.config.landlock import LandlockConfig
from cloudvmm.config.numa import NumaConfig, NumaDistance
from cloudvmm.config.pci import PciSegmentConfig
from cloudvmm.config.platform import NEW_VMGENID, PlatformConfig
from cloudvmm.config.warning import Warn, unheard
from cloudvmm.options.error import InvalidValue, ParseError
from cloudvmm.options.grammar import dequote, enquote
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
    ValueType,
    bare_truncated,
    truncated_integer_list,
    tuple_list,
)

# Whether it is a GUID is a rule of the configuration.
_VMGENID: ValueType[str] = ValueType(dequote, enquote, syntax=f"<guid>|{NEW_VMGENID}")

PLATFORM = Schema(
    "--platform",
    PlatformConfig,
    Key("num_pci_segments", U16, "Number of PCI segments, 1 to 96"),
    Key("iommu_segments", truncated_integer_list(16), "PCI segments behind the virtual IOMMU"),
    Key(
        "iommu_address_width",
        U8,
        "Bits of an address behind the virtual IOMMU, 64 at most",
        member="iommu_address_width_bits",
    ),
    Key("oem_strings", STRING_LIST, "SMBIOS: strings of the manufacturer"),
    Key("iommufd_fd", I32, "Open iommufd, inherited by this process"),
    Key("iommufd", TOGGLE, "Whether VFIO devices use iommufd; on where iommufd_fd is given"),
    Key("vfio_p2p_dma", TOGGLE, "Whether VFIO devices reach each other's memory"),
    Key("tdx", TOGGLE, "Whether the guest is an Intel TDX one"),
    Key("sev_snp", TOGGLE, "Whether the guest is an AMD SEV-SNP one"),
    Key("system_manufacturer", TEXT, "SMBIOS: manufacturer of the system"),
    Key("system_product_name", TEXT, "SMBIOS: product name of the system"),
    Key("system_version", TEXT, "SMBIOS: version of the system"),
    Key("system_serial_number", TEXT, "SMBIOS: serial number of the system"),
    Key("system_uuid", TEXT, "SMBIOS: UUID of the system"),
    Key("system_sku_number", TEXT, "SMBIOS: stock keeping number of the system"),
    Key("system_family", TEXT, "SMBIOS: family of the system"),
    Key("chassis_asset_tag", TEXT, "SMBIOS: asset tag of the chassis"),
    Key("vmgenid", _VMGENID, "VM generation id, which each restore and clone has another of"),
    Key("serial_number", TEXT, "Old name of system_serial_number", is_old=True),
    Key("uuid", TEXT, "Old name of system_uuid", is_old=True),
)

PCI_SEGMENT = Schema(
    "--pci-segment",
    PciSegmentConfig,
    Key("pci_segment", U16, "Number of the segment"),
    Key("mmio32_aperture_weight", U32, "Its share of the space below 4 GiB, against the other segments'"),
    Key("mmio64_aperture_weight", U32, "Its share of the space above 4 GiB, against the other segments'"),
)

NUMA = Schema(
    "--numa",
    NumaConfig,
    Key(
        "guest_numa_id",
        U32,
        "Number of the node",
        missing_cause=lambda: InvalidValue("guest_numa_id is required for all NUMA nodes"),
    ),
    Key("cpus", truncated_integer_list(32), "vCPUs of the node"),
    Key(
        "distances",
        tuple_list(
            bare_truncated(32),
            bare_truncated(8),
            make=lambda node, distance: NumaDistance(destination=node, distance=distance),
            split=lambda item: (item.destination, item.distance),
            syntax="[<node>@<distance>]",
        ),
        "Distances to other nodes",
    ),
    Key("device_id", TEXT, "Device that the node is for, instead of vCPUs and memory"),
    Key("memory_zones", STRING_LIST, "Identifiers of the memory zones of the node"),
    Key("pci_segments", truncated_integer_list(16), "PCI segments of the node"),
)

_LANDLOCK_MISSING = "path/access field missing"
_ACCESS = Key(
    "access",
    # Which letters it has is a rule of the configuration.
    ValueType(dequote, enquote, syntax="r|w|rw", choices=("r", "w", "rw")),
    "What is allowed there: to read, to write or both",
    missing=_LANDLOCK_MISSING,
)
LANDLOCK_ACCESS_HINT = f"--landlock-rules {_ACCESS.syntax}"
"""What is allowed where the rule of a configuration refuses the letters."""

LANDLOCK_RULES = Schema(
    "--landlock-rules",
    LandlockConfig,
    Key("path", PATH, "File or folder, which must exist", missing=_LANDLOCK_MISSING),
    _ACCESS,
)


def parse_platform(text: str, warn: Warn = unheard) -> PlatformConfig:
    """Read `--platform`. A descriptor in `iommufd_fd` turns `iommufd` on unless that is given, too.

    :raises OptionError: when `text` is not what `--platform` takes.
    """
    members = PLATFORM.members(text)
    for alias in ("serial_number", "uuid"):
        if alias in members:
            warn(f"'{alias}' in --platform is deprecated; use 'system_{alias}'.")
            members.setdefault(f"system_{alias}", members.pop(alias))
    members.setdefault("iommufd", "iommufd_fd" in members)
    return PlatformConfig(**members)


def parse_pci_segment(text: str) -> PciSegmentConfig:
    """:raises OptionError: when `text` is not what `--pci-segment` takes."""
    return PciSegmentConfig(**PCI_SEGMENT.members(text))


def parse_numa(text: str) -> NumaConfig:
    """:raises OptionError: when `text` is not what `--numa` takes."""
    members = NUMA.members(text)
    if "device_id" in members and ("cpus" in members or "memory_zones" in members):
        raise ParseError("--numa", hint="either device_id, or cpus and memory_zones") from InvalidValue(
            "device_id in numa config cannot be used with cpus or memory zones"
        )
    return NumaConfig(**members)


def parse_landlock_rule(text: str) -> LandlockConfig:
    """:raises OptionError: when `text` is not what `--landlock-rules` takes."""
    members = LANDLOCK_RULES.members(text)
    if len(members["access"]) > 2:
        raise ParseError("--landlock-rules", hint=_ACCESS.syntax) from InvalidValue(members["access"])
    return LandlockConfig(**members)


def format_platform(platform: PlatformConfig) -> str:
    """:raises Unprintable: no `--platform` gives `platform`."""
    if platform.iommufd == (platform.iommufd_fd is not None):
        return PLATFORM.format(platform, parse_platform, iommufd=None)
    return PLATFORM.format(platform, parse_platform, always=("iommufd",))


def format_pci_segment(segment: PciSegmentConfig) -> str:
    """:raises Unprintable: no `--pci-segment` gives `segment`."""
    return PCI_SEGMENT.format(segment, parse_pci_segment)


def format_numa(node: NumaConfig) -> str:
    """:raises Unprintable: no `--numa` gives `node`."""
    return NUMA.format(node, parse_numa)


def format_landlock_rule(rule: LandlockConfig) -> str:
    """:raises Unprintable: no `--landlock-rules` gives `rule`."""
    return LANDLOCK_RULES.format(rule, parse_landlock_rule)
