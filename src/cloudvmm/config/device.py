"""The smaller devices: one struct each, as config.md section 7 lists them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.memory import is_backed_by_shared_memory, total_size_bytes
from cloudvmm.config.number import I32, U8, U16, U32, U64
from cloudvmm.config.pci import IommuNotSupported, PciDevice, check_pci_device
from cloudvmm.config.queue import TooManyQueues, check_queue_size, is_power_of_two

if TYPE_CHECKING:
    from cloudvmm.config.vm import VmConfig


class RngConfig(PciDevice, kw_only=True):
    src: str


class RtcConfig(PciDevice, kw_only=True):
    pass


class BalloonConfig(PciDevice, kw_only=True):
    """`size` is the number of bytes taken from the guest. `statistics` is beyond the reference."""

    size: U64
    deflate_on_oom: bool = False
    free_page_reporting: bool = False
    statistics: bool | None = None


class FsConfig(PciDevice, kw_only=True):
    """Either a back end serves at `socket`, or one is started for the folder `shared_dir` (an addition)."""

    tag: str
    socket: str | None = None
    num_queues: U64 = 1
    queue_size: U16 = 1024
    shared_dir: str | None = None

    def __post_init__(self) -> None:
        if self.socket is None and self.shared_dir is None:
            # The words of msgspec, and so those of the reference, where a socket is a must.
            raise TypeError("Object missing required field `socket`")


class GenericVhostUserConfig(PciDevice, kw_only=True):
    socket: str
    queue_sizes: list[U16]
    device_type: U32


class PmemConfig(PciDevice, kw_only=True):
    file: str
    size: U64 | None = None
    discard_writes: bool = False


class DeviceConfig(PciDevice, kw_only=True):
    """A VFIO device: exactly one of `path` (sysfs) and `fd` (VFIO cdev)."""

    path: str | None = None
    fd: I32 | None = None
    x_nv_gpudirect_clique: U8 | None = None
    x_exclude_mmap_bars: list[U64] = msgspec.field(default_factory=list)


class UserDeviceConfig(PciDevice, kw_only=True):
    socket: str


class VdpaConfig(PciDevice, kw_only=True):
    path: str
    num_queues: U64 = 1


class VsockConfig(PciDevice, kw_only=True):
    cid: U32
    socket: str


class IvshmemConfig(PciDevice, kw_only=True):
    path: str
    size: U64


class TpmConfig(msgspec.Struct, kw_only=True):
    """Either a swtpm serves at `socket`, or one is started for the folder `state_dir` (an addition)."""

    socket: str | None = None
    state_dir: str | None = None

    def __post_init__(self) -> None:
        if self.socket is None and self.state_dir is None:
            # The words of msgspec, and so those of the reference, where a socket is a must.
            raise TypeError("Object missing required field `socket`")


class PvmemcontrolConfig(msgspec.Struct, kw_only=True):
    pass


SPECIAL_CIDS = (0, 1, 2, 0xFFFF_FFFF)
LAST_BAR = 5


class TpmSocketAndStateDir(ValidationError):
    """TPM socket and state_dir both provided"""


class UserDevicesRequireSharedMemory(ValidationError):
    """Using user devices requires using shared memory or huge pages"""


class VsockSpecialCid(ValidationError):
    def __init__(self, cid: int) -> None:
        super().__init__(f"{cid} is a special VSOCK CID")


class FsSocketAndSharedDir(ValidationError):
    """File system socket and shared_dir both provided"""


class BalloonLargerThanRam(ValidationError):
    def __init__(self, balloon: int, ram: int) -> None:
        super().__init__(f"Balloon size ({balloon}) greater than RAM ({ram})")


class VfioDeviceNeitherPathNorFd(ValidationError):
    """VFIO device config must specify `path=` or `fd=`"""


class VfioDeviceBothPathAndFd(ValidationError):
    """VFIO device config must specify at most one of `path=` or `fd=`"""


class VfioFdRequiresIommufdFd(ValidationError):
    """VFIO device `fd=` requires platform `iommufd_fd=<fd>`"""


class GpuDirectCliqueRequiresP2pDma(ValidationError):
    """Device with x_nv_gpudirect_clique requires vfio_p2p_dma=on"""


class InvalidDeviceExcludeMmapBar(ValidationError):
    def __init__(self, bar: int) -> None:
        super().__init__(f"Invalid VFIO excluded-mmap BAR index: {bar}")


class InvalidIvshmemInputSize(ValidationError):
    def __init__(self, size: int) -> None:
        super().__init__(f"Invalid ivshmem input size: {size}")


class InvalidIvshmemSize(ValidationError):
    def __init__(self, size: int) -> None:
        super().__init__(f"Invalid ivshmem backend file size: {size}")


class InvalidIvshmemPath(ValidationError):
    """Invalid ivshmem backend file path"""


def check_fs(fs: FsConfig, vm: VmConfig) -> None:
    """Raise the first rule that `fs` breaks as a member of `vm`."""
    if fs.socket is not None and fs.shared_dir is not None:
        raise FsSocketAndSharedDir
    if fs.num_queues > vm.cpus.boot_vcpus:
        raise TooManyQueues(fs.num_queues, vm.cpus.boot_vcpus)
    check_queue_size(fs.queue_size)
    check_unbehind_iommu(fs, vm)


def check_generic_vhost_user(device: GenericVhostUserConfig, vm: VmConfig) -> None:
    if device.iommu:
        raise IommuNotSupported
    for queue_size in device.queue_sizes:
        check_queue_size(queue_size)
    check_pci_device(device, vm)


def check_unbehind_iommu(device: PciDevice, vm: VmConfig) -> None:
    """Check a device of a kind that cannot be placed behind the IOMMU."""
    if device.iommu:
        raise IommuNotSupported
    check_pci_device(device, vm)


def check_tpm(tpm: TpmConfig) -> None:
    if tpm.socket is not None and tpm.state_dir is not None:
        raise TpmSocketAndStateDir


def check_user_devices(vm: VmConfig) -> None:
    if vm.user_devices and not is_backed_by_shared_memory(vm.memory):
        raise UserDevicesRequireSharedMemory


def check_vsock_cid(vsock: VsockConfig) -> None:
    if vsock.cid in SPECIAL_CIDS:
        raise VsockSpecialCid(vsock.cid)


def check_balloon_size(balloon: BalloonConfig, vm: VmConfig) -> None:
    ram = total_size_bytes(vm.memory)
    if balloon.size >= ram:
        raise BalloonLargerThanRam(balloon.size, ram)


def check_vfio_device(device: DeviceConfig, vm: VmConfig) -> None:
    """Raise the first rule that `device` breaks as a member of `vm`."""
    check_pci_device(device, vm)
    if device.path is None and device.fd is None:
        raise VfioDeviceNeitherPathNorFd
    if device.path is not None and device.fd is not None:
        raise VfioDeviceBothPathAndFd
    if device.fd is not None and (vm.platform is None or vm.platform.iommufd_fd is None):
        raise VfioFdRequiresIommufdFd
    if device.x_nv_gpudirect_clique is not None and vm.platform and not vm.platform.vfio_p2p_dma:
        raise GpuDirectCliqueRequiresP2pDma
    for bar in device.x_exclude_mmap_bars:
        if bar > LAST_BAR:
            raise InvalidDeviceExcludeMmapBar(bar)


def check_ivshmem(ivshmem: IvshmemConfig, vm: VmConfig) -> None:
    """Raise the first rule that `ivshmem` breaks; looks at the size of its file."""
    check_unbehind_iommu(ivshmem, vm)
    if not is_power_of_two(ivshmem.size):
        raise InvalidIvshmemInputSize(ivshmem.size)
    try:
        file_size = os.stat(ivshmem.path).st_size
    except (OSError, ValueError):
        raise InvalidIvshmemPath from None
    if file_size < ivshmem.size:
        raise InvalidIvshmemSize(file_size)
