"""The platform as a whole: PCI segments, vIOMMU, SMBIOS identity, the generation of the guest."""

from __future__ import annotations

import re

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.number import I32, U8, U16
from cloudvmm.config.pci import InvalidPciSegment


class PlatformConfig(msgspec.Struct, kw_only=True):
    num_pci_segments: U16 = 1
    iommu_segments: list[U16] | None = None
    iommu_address_width_bits: U8 = 64
    system_serial_number: str | None = None
    system_uuid: str | None = None
    oem_strings: list[str] | None = None
    system_manufacturer: str | None = None
    system_product_name: str | None = None
    system_version: str | None = None
    system_family: str | None = None
    system_sku_number: str | None = None
    chassis_asset_tag: str | None = None
    tdx: bool = False
    sev_snp: bool = False
    iommufd: bool = False
    iommufd_fd: I32 | None = None
    vfio_p2p_dma: bool = True
    vmgenid: str | None = None


MAX_NUM_PCI_SEGMENTS = 96
MAX_IOMMU_ADDRESS_WIDTH_BITS = 64
NEW_VMGENID = "auto"
_GUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class InvalidNumPciSegments(ValidationError):
    def __init__(self, segments: int) -> None:
        super().__init__(f"Number of PCI segments ({segments}) not in range of 1 to {MAX_NUM_PCI_SEGMENTS}")


class InvalidIommuAddressWidthBits(ValidationError):
    def __init__(self, bits: int) -> None:
        super().__init__(
            f"IOMMU address width in bits ({bits}) should be less than or equal to "
            f"{MAX_IOMMU_ADDRESS_WIDTH_BITS}"
        )


class IommufdFdRequiresIommufd(ValidationError):
    """Platform `iommufd_fd=<fd>` requires `iommufd=on`"""


class InvalidVmgenid(ValidationError):
    def __init__(self, text: str) -> None:
        super().__init__(f"VM generation id '{text}' is neither a GUID nor '{NEW_VMGENID}'")


def check_platform(platform: PlatformConfig) -> None:
    if not 1 <= platform.num_pci_segments <= MAX_NUM_PCI_SEGMENTS:
        raise InvalidNumPciSegments(platform.num_pci_segments)
    for segment in platform.iommu_segments or ():
        if segment >= platform.num_pci_segments:
            raise InvalidPciSegment(segment)
    if platform.iommu_address_width_bits > MAX_IOMMU_ADDRESS_WIDTH_BITS:
        raise InvalidIommuAddressWidthBits(platform.iommu_address_width_bits)
    if platform.iommufd_fd is not None and not platform.iommufd:
        raise IommufdFdRequiresIommufd
    vmgenid = platform.vmgenid
    if vmgenid is not None and vmgenid != NEW_VMGENID and _GUID.fullmatch(vmgenid) is None:
        raise InvalidVmgenid(vmgenid)
