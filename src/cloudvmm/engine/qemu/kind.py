"""The kinds of devices that this engine makes, at its start and later: one line for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from cloudvmm.config.device import (
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    PmemConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import DeviceError, NotSupportedYet
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.disk import disk_parts, open_disk
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.fs import fs_parts, open_fs
from cloudvmm.engine.qemu.generic_vhost_user import generic_vhost_user_parts, open_generic_vhost_user
from cloudvmm.engine.qemu.iommu import behind_iommu
from cloudvmm.engine.qemu.net import net_parts, open_net
from cloudvmm.engine.qemu.parts import Parts
from cloudvmm.engine.qemu.pmem import open_pmem, pmem_parts
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.user_device import open_user_device, user_device_parts
from cloudvmm.engine.qemu.vdpa import open_vdpa_device, vdpa_parts
from cloudvmm.engine.qemu.vfio import open_vfio, vfio_parts
from cloudvmm.engine.qemu.vhost_user_disk import open_vhost_user_disk, vhost_user_disk_parts
from cloudvmm.engine.qemu.vsock import open_vsock, vsock_parts


class QemuLacksDevice(DeviceError):
    def __init__(self, needs: Needs, facts: QemuFacts) -> None:
        super().__init__(
            f"{needs.what} need a QEMU with the device {needs.driver}, which comes with QEMU {needs.since}: "
            f"{facts.binary} is QEMU {facts.version_text} and lacks it"
        )


class Needs(msgspec.Struct, frozen=True):
    """What not every QEMU has: `what`, such as "pmem devices", need its device `driver`, new in `since`."""

    what: str
    driver: str
    since: str


class Kind(msgspec.Struct, frozen=True):
    """`open` makes the backing of a device, or raises `DeviceError`; `describe` makes its parts. Pure.

    `member` is where `VmConfig` has such devices: a list, a single one, or none. An `open` that
    `waits` may wait for another program; it takes an `Attempt`, too, by which that can be ended.
    `behind_iommu` tells whether they can be behind the vIOMMU, as far as the rules of the configuration let
    them.
    """

    member: str
    open: Callable[..., Backing]
    describe: Callable[[Any, Any, Seat], Parts]
    needs: Needs | None = None
    waits: bool = False
    behind_iommu: bool = True


def _open_disk(disk: DiskConfig, attempt: Attempt) -> Backing:
    return open_vhost_user_disk(disk, attempt) if disk.vhost_user else open_disk(disk)


def _disk_parts(disk: DiskConfig, backing: Any, seat: Seat) -> Parts:
    return (vhost_user_disk_parts if disk.vhost_user else disk_parts)(disk, backing, seat)


KINDS: Final[dict[type[PciDevice], Kind]] = {
    DiskConfig: Kind("disks", _open_disk, _disk_parts, waits=True),
    NetConfig: Kind("net", open_net, net_parts, waits=True),
    GenericVhostUserConfig: Kind(
        "generic_vhost_user", open_generic_vhost_user, generic_vhost_user_parts, waits=True
    ),
    FsConfig: Kind("fs", open_fs, fs_parts, waits=True),
    PmemConfig: Kind("pmem", open_pmem, pmem_parts),
    VsockConfig: Kind("vsock", open_vsock, vsock_parts, waits=True, behind_iommu=False),
    VdpaConfig: Kind(
        "vdpa", open_vdpa_device, vdpa_parts, Needs("vDPA devices", "vhost-vdpa-device-pci", "8.0")
    ),
    DeviceConfig: Kind("devices", open_vfio, vfio_parts),
    UserDeviceConfig: Kind(
        "user_devices",
        open_user_device,
        user_device_parts,
        Needs("vfio-user devices", "vfio-user-pci", "11.0"),
    ),
}


def devices_of(vm_config: VmConfig) -> Iterator[PciDevice]:
    """Yield every device of a kind in `KINDS`, in the order in which they are made."""
    for kind in KINDS.values():
        found = getattr(vm_config, kind.member)
        if isinstance(found, PciDevice):
            yield found
        else:
            yield from found or ()


def check_means(vm_config: VmConfig, facts: QemuFacts) -> None:
    """Raise what keeps the QEMU at hand from having one of the devices, as `check_device_means` does."""
    for device in devices_of(vm_config):
        check_device_means(device, facts)


def check_device_means(device: PciDevice, facts: QemuFacts) -> None:
    """Look whether the QEMU at hand can have such a device, before anything is opened for it.

    :raises NotSupportedYet: no QEMU can have it behind the vIOMMU.
    :raises QemuLacksDevice: this one cannot have it.
    """
    kind = KINDS[type(device)]
    if device.iommu and not kind.behind_iommu:
        raise NotSupportedYet(
            f"Not supported by this release: {kind.member} devices behind the virtual IOMMU"
        )
    if kind.needs is not None and not facts.has_device(kind.needs.driver):
        raise QemuLacksDevice(kind.needs, facts)


def open_backing(device: PciDevice, attempt: Attempt) -> Backing:
    """Blocking. Open what `device` stands on; nothing is locked yet. The caller owns the result.

    :raises DeviceError: it cannot be had. :raises MachineGone: `attempt` was aborted.
    """
    kind = KINDS[type(device)]
    return kind.open(device, attempt) if kind.waits else kind.open(device)


def describe(device: PciDevice, backing: Backing, seat: Seat) -> Parts:
    """Return what `device` is made of. Pure.

    :raises NoSlot: it has none.
    """
    parts = KINDS[type(device)].describe(device, backing, seat)
    return behind_iommu(parts) if device.iommu else parts
