"""Block devices of a VM."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.number import U16, U64
from cloudvmm.config.pci import IommuNotSupported, PciDevice, check_pci_device
from cloudvmm.config.queue import TooManyQueues, check_queue_size
from cloudvmm.config.rate_limit import InvalidRateLimiterGroup, RateLimiterConfig
from cloudvmm.config.vhost_user import check_vhost_user

if TYPE_CHECKING:
    from cloudvmm.config.vm import VmConfig


class ImageType(enum.Enum):
    FLAT_VMDK = "FlatVmdk"
    FIXED_VHD = "FixedVhd"
    QCOW2 = "Qcow2"
    RAW = "Raw"
    VHDX = "Vhdx"
    UNKNOWN = "Unknown"


class LockGranularity(enum.Enum):
    BYTE_RANGE = "ByteRange"
    FULL = "Full"


class VirtQueueAffinity(msgspec.Struct, kw_only=True):
    queue_index: U16
    host_cpus: list[U64]


class DiskConfig(PciDevice, kw_only=True):
    path: str | None = None
    readonly: bool = False
    direct: bool = False
    num_queues: U64 = 1
    queue_size: U16 = 128
    vhost_user: bool = False
    vhost_socket: str | None = None
    rate_limit_group: str | None = None
    rate_limiter_config: RateLimiterConfig | None = None
    disable_io_uring: bool = False
    disable_aio: bool = False
    serial: str | None = None
    queue_affinity: list[VirtQueueAffinity] | None = None
    backing_files: bool = False
    sparse: bool = True
    image_type: ImageType = ImageType.UNKNOWN
    lock_granularity: LockGranularity = LockGranularity.BYTE_RANGE


MINIMUM_QUEUE_SIZE = 2
SERIAL_MAX_BYTES = 20


class DiskSocketAndPath(ValidationError):
    """Disk path and vhost socket both provided"""


class BlockQueueSizeTooSmall(ValidationError):
    def __init__(self, size: int) -> None:
        super().__init__(f"Block queue size must be greater than {MINIMUM_QUEUE_SIZE}: {size}")


class InvalidSerialLength(ValidationError):
    def __init__(self, length: int) -> None:
        super().__init__(
            f"Block device serial length ({length}) exceeds maximum allowed length ({SERIAL_MAX_BYTES})"
        )


def check_disk(disk: DiskConfig, vm: VmConfig) -> None:
    """Raise the first rule that `disk` breaks as a member of `vm`."""
    is_rate_limited = disk.rate_limiter_config is not None or disk.rate_limit_group is not None
    if disk.vhost_socket is not None and disk.path is not None:
        raise DiskSocketAndPath
    if disk.vhost_user:
        check_vhost_user(vm.memory, vhost_socket=disk.vhost_socket, is_rate_limited=is_rate_limited)
    if disk.rate_limit_group is not None:
        groups = {group.id for group in vm.rate_limit_groups or ()}
        if disk.rate_limit_group not in groups:
            raise InvalidRateLimiterGroup
    check_pci_device(disk, vm)
    _check_queues(disk, vm)
    if disk.vhost_user and disk.iommu:
        raise IommuNotSupported
    if disk.rate_limiter_config is not None and disk.rate_limit_group is not None:
        raise InvalidRateLimiterGroup
    serial_bytes = len((disk.serial or "").encode())
    if serial_bytes > SERIAL_MAX_BYTES:
        raise InvalidSerialLength(serial_bytes)


def _check_queues(disk: DiskConfig, vm: VmConfig) -> None:
    if disk.num_queues > vm.cpus.boot_vcpus:
        raise TooManyQueues(disk.num_queues, vm.cpus.boot_vcpus)
    check_queue_size(disk.queue_size)
    if disk.queue_size <= MINIMUM_QUEUE_SIZE:
        raise BlockQueueSizeTooSmall(disk.queue_size)
