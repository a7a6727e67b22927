"""The virtual IOMMU, and what stands behind it.

QEMU's serves the whole bus: to the guest every device there has a group of its own. A virtio device goes
through it only where it is told so (`behind_iommu`); all others reach the guest's memory as before. So, as in
the reference, just those are behind it that the configuration puts there.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.engine.base import EngineError, MachineSpec
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.slot import place

IOMMU_ID: Final = "__iommu"
_WIDTH_SINCE: Final = (9, 0, 0)
_WIDEST: Final = 64  # what an older QEMU has, always
_NARROWEST: Final = 32


class IommuWidthNotPossible(EngineError):
    def __init__(self, bits: int, *, version: str) -> None:
        super().__init__(f"The vIOMMU of QEMU {version} cannot have {bits} address bits")


def iommu_parts(spec: MachineSpec, facts: QemuFacts) -> Parts:
    """Describe the vIOMMU. It must be made before whatever may be behind it.

    :raises IommuWidthNotPossible: this QEMU has no such IOMMU.
    """
    if not spec.vm_config.iommu:
        return Parts()
    device: Properties = {
        "driver": "virtio-iommu-pci",
        "id": qdev_id(IOMMU_ID),
        **place(spec.slots, IOMMU_ID),
    }
    platform = spec.vm_config.platform
    bits = _WIDEST if platform is None else platform.iommu_address_width_bits
    if facts.version >= _WIDTH_SINCE and bits >= _NARROWEST:
        device["aw-bits"] = bits
    elif bits != _WIDEST:
        raise IommuWidthNotPossible(bits, version=facts.version_text)
    return Parts(devices=[device])


def behind_iommu(parts: Parts) -> Parts:
    """Return `parts` with their virtio devices behind the vIOMMU; another PCI device is there anyway."""
    for device in parts.devices:
        if "addr" in device and device["driver"].startswith(("virtio-", "vhost-")):
            device["iommu_platform"] = True
    return parts
