"""The platform as a whole: PCI segments, vIOMMU, SMBIOS identity; NUMA nodes; Landlock rules."""

from __future__ import annotations

import msgspec

from cloudvmm.config.number import U8, U16, U32


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
    iommufd: bool = False
    iommufd_fd: int | None = None
    vfio_p2p_dma: bool = True


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


class LandlockConfig(msgspec.Struct, kw_only=True):
    path: str
    access: str
