"""The smaller devices: one struct each, as config.md section 7 lists them."""

from __future__ import annotations

import msgspec

from cloudvmm.config.number import U8, U16, U32, U64
from cloudvmm.config.pci import PciDevice


class RngConfig(PciDevice, kw_only=True):
    src: str


class RtcConfig(PciDevice, kw_only=True):
    pass


class BalloonConfig(PciDevice, kw_only=True):
    """`size` is the number of bytes taken from the guest."""

    size: U64
    deflate_on_oom: bool = False
    free_page_reporting: bool = False


class FsConfig(PciDevice, kw_only=True):
    tag: str
    socket: str
    num_queues: U32 = 1
    queue_size: U16 = 1024


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
    fd: int | None = None
    x_nv_gpudirect_clique: U8 | None = None
    x_exclude_mmap_bars: list[U64] = msgspec.field(default_factory=list)


class UserDeviceConfig(PciDevice, kw_only=True):
    socket: str


class VdpaConfig(PciDevice, kw_only=True):
    path: str
    num_queues: U32 = 1


class VsockConfig(PciDevice, kw_only=True):
    cid: U32
    socket: str


class IvshmemConfig(PciDevice, kw_only=True):
    path: str
    size: U64


class TpmConfig(msgspec.Struct, kw_only=True):
    socket: str


class PvmemcontrolConfig(msgspec.Struct, kw_only=True):
    pass
