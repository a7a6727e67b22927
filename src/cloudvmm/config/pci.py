"""What every PCI device has in common, and PCI segments."""

from __future__ import annotations

import msgspec

from cloudvmm.config.number import U8, U16, U32


class PciDevice(msgspec.Struct, kw_only=True):
    """Members on the same JSON level as the device's own (reference: config.md section 6).

    `id` is generated at boot or hot add where it is unset; `pci_device_id` is the slot wished for.
    """

    id: str | None = None
    iommu: bool = False
    pci_segment: U16 = 0
    pci_device_id: U8 | None = None


class PciSegmentConfig(msgspec.Struct, kw_only=True):
    pci_segment: U16 = 0
    mmio32_aperture_weight: U32 = 1
    mmio64_aperture_weight: U32 = 1
