"""VFIO devices: functions of the host's PCI bus, or mediated devices, that the guest has as its own.

Without iommufd QEMU opens the device by its group. With it, QEMU opens the device itself or is given the open
device; all of a machine's share one iommufd, which is there from its start.
"""

from __future__ import annotations

import os
from typing import Final

from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.backing import Backing, id_of
from cloudvmm.engine.qemu.memory import rams_of
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.host.vfio import (
    VfioError,
    check_cdev,
    check_group,
    check_iommu,
    check_memory_lock,
    find_device,
)

IOMMUFD_ID: Final = "iommufd0"


class VfioCreateError(DeviceError):
    """Cannot create a VFIO device"""


class VfioMapError(DeviceError):
    """Failed to DMA map VFIO device"""


class VfioFdError(DeviceError):
    """Failed to duplicate VFIO device FD"""


class IommufdCreateError(DeviceError):
    """Cannot create iommufd"""


class VfioBacking(Backing, kw_only=True):
    """Either the `folder` of the device in sysfs, or our duplicate `fd` of the open device."""

    folder: str | None = None
    fd: int = -1

    @property
    def fds(self) -> list[int]:
        return [] if self.fd < 0 else [self.fd]

    def check_in(self, vm_config: VmConfig) -> None:
        platform = vm_config.platform
        try:
            if self.folder is not None and has_iommufd(platform):
                check_cdev(self.folder)
            elif self.folder is not None:
                check_group(self.folder)
        except VfioError as error:
            raise VfioCreateError from error
        try:
            check_memory_lock(sum(ram.size for ram in rams_of(vm_config.memory)))
        except VfioError as error:
            raise VfioMapError from error

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def has_iommufd(platform: PlatformConfig | None) -> bool:
    return platform is not None and platform.iommufd


def open_vfio(device: DeviceConfig) -> VfioBacking:
    """Find the device by its path, or duplicate what is passed. The caller owns the result.

    :raises DeviceError: it cannot be had; the cause tells why.
    """
    device_id = id_of(device.id)
    if device.path is None:
        try:
            return VfioBacking(device_id=device_id, fd=os.dup(-1 if device.fd is None else device.fd))
        except OSError as error:
            raise VfioFdError from error
    try:
        return VfioBacking(device_id=device_id, folder=find_device(device.path))
    except VfioError as error:
        raise VfioCreateError from error


def open_iommufd(platform: PlatformConfig | None) -> int | None:
    """Duplicate the iommufd that is passed, if any, or make sure that QEMU can make one if it must.

    The caller owns the result.

    :raises IommufdCreateError: it cannot be had; the cause tells why.
    """
    if platform is None or not platform.iommufd:
        return None
    try:
        if platform.iommufd_fd is not None:
            return os.dup(platform.iommufd_fd)
        check_iommu()
    except (OSError, VfioError) as error:
        raise IommufdCreateError from error
    return None


def iommufd_parts(platform: PlatformConfig | None, *, fd: int | None) -> Parts:
    """Describe the machine's iommufd; nothing where it has none. `fd` is the open one that is passed on."""
    if not has_iommufd(platform):
        return Parts()
    given = {} if fd is None else {"fd": str(fd)}
    return Parts(objects=[{"qom-type": "iommufd", "id": IOMMUFD_ID, **given}])


def vfio_parts(device: DeviceConfig, backing: VfioBacking, seat: Seat) -> Parts:
    """Describe `device`. QEMU leaves all BARs unmapped or none."""
    properties: Properties = {
        "driver": "vfio-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
    }
    if backing.folder is not None:
        properties["sysfsdev"] = backing.folder
    else:
        properties["fd"] = str(backing.fd)
    if seat.has_iommufd:
        properties["iommufd"] = IOMMUFD_ID
    if device.x_nv_gpudirect_clique is not None:
        properties["x-nv-gpudirect-clique"] = device.x_nv_gpudirect_clique
    if device.x_exclude_mmap_bars:
        properties["x-no-mmap"] = True
    return Parts(devices=[properties])
