"""The passthrough lane's outer machine: it has an IOMMU, and PCI functions to give away.

Its kernel is Debian's generic one, for vDPA. Its NVMe drive and its network card have IOMMU groups of their
own, so each can be given to an inner guest. No test lives here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lane.machine import Hardware

NVME: Final = "0000:00:09.0"
NIC: Final = "0000:00:0a.0"
SHARED: Final = "0000:00:1f.3"  # in one group with the SATA controller, which the host uses
DRIVE_BYTES: Final = 16 * 1024 * 1024
PROGRAMS: Final = ("qemu-storage-daemon", "vdpa")
# What the machine itself needs, ahead of what it gives away.
MODULES: Final = (
    *("ext4", "crc32c_generic", "crc32c_intel"),
    *("kvm_amd", "tun", "vfio_pci", "vfio_iommu_type1", "vduse", "vhost_vdpa", "nvme", "e1000e", "ahci"),
)


def hardware(drive: Path) -> Hardware:
    """Return a PC with an IOMMU whose NVMe drive is the raw image `drive`."""
    return Hardware(
        options=(
            *("-machine", "q35,vmport=off,kernel-irqchip=split"),
            *("-device", "intel-iommu,intremap=on"),
            *("-blockdev", f"driver=file,node-name=spare,filename={drive}"),
            *("-device", f"nvme,serial=lane,drive=spare,bus=pcie.0,addr={_slot(NVME)}"),
            *("-device", f"e1000e,bus=pcie.0,addr={_slot(NIC)}"),
        ),
        words="intel_iommu=on",
    )


def _slot(bdf: str) -> str:
    return f"0x{bdf[8:10]}"
