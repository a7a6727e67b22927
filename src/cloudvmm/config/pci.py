"""What every PCI device has in common, and PCI segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.number import U8, U16, U32

if TYPE_CHECKING:
    from cloudvmm.config.vm import VmConfig


class PciDevice(msgspec.Struct, kw_only=True):
    """Members that every PCI device has, on the same JSON level as its own.

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


DEFAULT_NUM_PCI_SEGMENTS = 1
NUM_DEVICE_IDS = 32
ROOT_DEVICE_ID = 0


class InvalidPciSegment(ValidationError):
    def __init__(self, segment: int) -> None:
        super().__init__(f"Invalid PCI segment id: {segment}")


class InvalidPciSegmentApertureWeight(ValidationError):
    def __init__(self, weight: int) -> None:
        super().__init__(f"Invalid PCI segment aperture weight: {weight}")


class OnIommuSegment(ValidationError):
    def __init__(self, segment: int) -> None:
        super().__init__(f"Device is on an IOMMU PCI segment ({segment}) but not placed behind IOMMU")


class InvalidPciDeviceId(ValidationError):
    def __init__(self, device_id: int) -> None:
        super().__init__(
            f"Given PCI device ID ({device_id}) is out of the supported range of 0..{NUM_DEVICE_IDS}"
        )


class ReservedPciDeviceId(ValidationError):
    def __init__(self, device_id: int) -> None:
        super().__init__(f"Given PCI device ID ({device_id}) is reserved")


class IommuNotSupported(ValidationError):
    """Device does not support being placed behind IOMMU"""


def num_pci_segments(vm: VmConfig) -> int:
    return DEFAULT_NUM_PCI_SEGMENTS if vm.platform is None else vm.platform.num_pci_segments


def check_pci_device(device: PciDevice, vm: VmConfig) -> None:
    """Raise the first rule that the members common to PCI devices break."""
    if device.pci_segment >= num_pci_segments(vm):
        raise InvalidPciSegment(device.pci_segment)
    iommu_segments = (vm.platform.iommu_segments if vm.platform else None) or ()
    if device.pci_segment in iommu_segments and not device.iommu:
        raise OnIommuSegment(device.pci_segment)
    if device.pci_device_id is not None:
        _check_slot(device.pci_device_id, segment=device.pci_segment)


def _check_slot(device_id: int, *, segment: int) -> None:
    if device_id >= NUM_DEVICE_IDS:
        raise InvalidPciDeviceId(device_id)
    if device_id == ROOT_DEVICE_ID and segment == 0:
        raise ReservedPciDeviceId(device_id)


def check_pci_segment(segment: PciSegmentConfig, vm: VmConfig) -> None:
    if segment.pci_segment >= num_pci_segments(vm):
        raise InvalidPciSegment(segment.pci_segment)
    for weight in (segment.mmio32_aperture_weight, segment.mmio64_aperture_weight):
        if weight == 0:
            raise InvalidPciSegmentApertureWeight(weight)
