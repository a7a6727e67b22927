"""PCI functions and mediated devices that the host gives away by VFIO: is the one at a path to be had?

Only looked at. Opening it for good, mapping the guest's memory and handling interrupts are the hypervisor's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import struct
from typing import Final

from cloudvmm.host.error import HostError

_GROUPS: Final = "/dev/vfio"
_CONTAINER: Final = "vfio"
_CDEVS: Final = "/dev/vfio/devices"
_IOMMU: Final = "/dev/iommu"

_VFIO_CHECK_EXTENSION: Final = 0x3B65
_VFIO_TYPE1V2_IOMMU: Final = 3
_VFIO_GROUP_GET_STATUS: Final = 0x3B67
_GROUP_STATUS: Final = struct.Struct("II")  # argsz, flags
_IS_VIABLE: Final = 0x1
_CAP_IPC_LOCK: Final = 14


class VfioError(HostError):
    """Root of what keeps a device from being given to a guest"""


class HostDeviceMissing(VfioError):
    def __init__(self, path: str) -> None:
        super().__init__(f"There is no device {path}")


class NotAHostDevice(VfioError):
    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is no device: a folder such as /sys/bus/pci/devices/0000:01:00.0 is needed")


class NoIommuGroup(VfioError):
    def __init__(self, name: str) -> None:
        super().__init__(f"The device {name} is in no IOMMU group: the host has no IOMMU, or it is off")


class VfioDriverMissing(VfioError):
    def __init__(self, name: str, driver: str | None) -> None:
        has = "no driver" if driver is None else f"the driver {driver}"
        super().__init__(f"The device {name} has {has}, and needs vfio-pci")


class OpenVfioGroup(VfioError):
    def __init__(self, group: str) -> None:
        super().__init__(f"Failed to open {_GROUPS}/{group} group")


class VfioGroupNotViable(VfioError):
    def __init__(self, names: list[str]) -> None:
        held = f": {', '.join(names)} must be bound to vfio-pci or to nothing" if names else ""
        super().__init__(f"Group is not viable{held}")


class OpenVfioContainer(VfioError):
    """Failed to open /dev/vfio/vfio container"""


class NoVfioType1(VfioError):
    """Container doesn't support VfioType1V2 IOMMU driver type: load the module vfio_iommu_type1"""


class OpenIommufd(VfioError):
    """Failed to open /dev/iommu"""


class NoVfioCdev(VfioError):
    def __init__(self, name: str) -> None:
        super().__init__(f"The device {name} has no entry in {_CDEVS}, which iommufd needs")


class MemoryLockLimit(VfioError):
    def __init__(self, limit_bytes: int, wanted_bytes: int) -> None:
        super().__init__(
            f"The limit of locked memory (RLIMIT_MEMLOCK) is {limit_bytes} bytes, "
            f"below the guest's memory of {wanted_bytes} bytes"
        )


def find_device(path: str) -> str:
    """Return the folder of sysfs in which the device at `path` really is.

    :raises VfioError: there is none, it is of another kind, in no IOMMU group or without a driver of VFIO.
    """
    try:
        folder = os.path.realpath(path, strict=True)
    except (OSError, ValueError) as error:
        raise HostDeviceMissing(path) from error
    if not os.path.exists(f"{folder}/subsystem"):
        raise NotAHostDevice(path)
    name = os.path.basename(folder)
    if _link(folder, "iommu_group") is None:
        raise NoIommuGroup(name)
    driver = _link(folder, "driver")
    if driver is None or "vfio" not in driver:
        raise VfioDriverMissing(name, driver)
    return folder


def check_group(folder: str) -> None:
    """Raise unless the device in `folder`, as `find_device` found it, can be opened by its group.

    :raises VfioError: its group cannot be opened, or has devices that the host uses; or VFIO is not there.
    """
    group = _link(folder, "iommu_group") or ""
    try:
        fd = os.open(f"{_GROUPS}/{group}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        # A group is opened once only: a machine of ours may have another of its devices already.
        if error.errno != errno.EBUSY:
            raise OpenVfioGroup(group) from error
    else:
        try:
            _check_viable(fd, folder)
        finally:
            os.close(fd)
    _check_container()


def check_cdev(folder: str) -> None:
    """Raise unless the device in `folder` can be opened by itself, for an iommufd.

    :raises VfioError: the host's kernel has no such entry for it.
    """
    try:
        found = os.listdir(f"{folder}/vfio-dev")
    except OSError as error:
        raise NoVfioCdev(os.path.basename(folder)) from error
    if not any(os.path.exists(f"{_CDEVS}/{name}") for name in found):
        raise NoVfioCdev(os.path.basename(folder))


def check_iommu() -> None:
    """:raises OpenIommufd: the host gives no iommufd."""
    try:
        os.close(os.open(_IOMMU, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise OpenIommufd from error


def check_memory_lock(wanted_bytes: int) -> None:
    """Raise where this process, and so its children, may not lock `wanted_bytes` of memory.

    :raises MemoryLockLimit: they may not.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and limit < wanted_bytes and not _may_lock_all():
        raise MemoryLockLimit(limit, wanted_bytes)


def _check_viable(group_fd: int, folder: str) -> None:
    buffer = bytearray(_GROUP_STATUS.pack(_GROUP_STATUS.size, 0))
    fcntl.ioctl(group_fd, _VFIO_GROUP_GET_STATUS, buffer)
    _, flags = _GROUP_STATUS.unpack(buffer)
    if not flags & _IS_VIABLE:
        raise VfioGroupNotViable(_held_by_host(f"{folder}/iommu_group/devices"))


def _held_by_host(devices: str) -> list[str]:
    """Return the members of a group that have a driver which is none of VFIO's."""
    drivers = {name: _link(f"{devices}/{name}", "driver") for name in sorted(os.listdir(devices))}
    return [name for name, driver in drivers.items() if driver is not None and "vfio" not in driver]


def _check_container() -> None:
    try:
        fd = os.open(f"{_GROUPS}/{_CONTAINER}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OpenVfioContainer from error
    try:
        if not fcntl.ioctl(fd, _VFIO_CHECK_EXTENSION, _VFIO_TYPE1V2_IOMMU):
            raise NoVfioType1
    finally:
        os.close(fd)


def _link(folder: str, name: str) -> str | None:
    """Return the last part of where the link `name` leads; None where there is none."""
    try:
        return os.path.basename(os.readlink(f"{folder}/{name}"))
    except OSError:
        return None


def _may_lock_all() -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False
