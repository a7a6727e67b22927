"""Block devices of a VM."""

from __future__ import annotations

import enum

import msgspec

from cloudvmm.config.number import U16, U32
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.rate_limit import RateLimiterConfig


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
    host_cpus: list[U32]


class DiskConfig(PciDevice, kw_only=True):
    path: str | None = None
    readonly: bool = False
    direct: bool = False
    num_queues: U32 = 1
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
