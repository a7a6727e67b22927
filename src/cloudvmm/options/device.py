"""The smaller devices: rng, rtc, balloon, fs, generic vhost-user, pmem, VFIO, vfio-user, vDPA, vsock,
ivshmem, tpm."""

from __future__ import annotations

from cloudvmm.config.device import (
    BalloonConfig,
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    IvshmemConfig,
    PmemConfig,
    RngConfig,
    RtcConfig,
    TpmConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.number import MIB
from cloudvmm.config.vm import DEFAULT_RNG_SOURCE
from cloudvmm.options.error import FsTagTooLong
from cloudvmm.options.schema import PCI_KEYS, PCI_KEYS_IOMMU, Key, Schema
from cloudvmm.options.value import (
    BYTE_SIZED,
    I32,
    PATH,
    TEXT,
    TOGGLE,
    U8,
    U16,
    U32,
    U64,
    ValueType,
    integer_list,
)
from cloudvmm.options.virtio_id import parse_device_type

_FS_TAG_MAX_BYTES = 36


def _parse_tag(text: str) -> str:
    tag = TEXT.parse(text)
    if len(tag.encode()) > _FS_TAG_MAX_BYTES:
        raise FsTagTooLong
    return tag


RNG = Schema("--rng", Key("src", PATH, default=DEFAULT_RNG_SOURCE), *PCI_KEYS_IOMMU)
RTC = Schema("--rtc", *PCI_KEYS_IOMMU)
BALLOON = Schema(
    "--balloon",
    Key("size", BYTE_SIZED, default=0),
    Key("deflate_on_oom", TOGGLE),
    Key("free_page_reporting", TOGGLE),
    *PCI_KEYS_IOMMU,
)
FS = Schema(
    "--fs",
    Key("tag", ValueType(_parse_tag, syntax="<tag_name>"), missing="tag missing"),
    Key("socket", PATH, missing="socket missing"),
    Key("queue_size", U16),
    Key("num_queues", U64),
    *PCI_KEYS,
)
GENERIC_VHOST_USER = Schema(
    "--generic-vhost-user",
    Key("socket", PATH, missing="socket missing"),
    Key("queue_sizes", integer_list(16), missing="queue size missing"),
    Key("virtio_id", TEXT),
    Key("device_type", TEXT),
    *PCI_KEYS,
)
PMEM = Schema(
    "--pmem",
    *PCI_KEYS_IOMMU,
    Key("file", PATH, missing="file missing"),
    Key("size", BYTE_SIZED),
    Key("discard_writes", TOGGLE),
)
DEVICE = Schema(
    "--device",
    *PCI_KEYS_IOMMU,
    Key("path", PATH),
    Key("fd", I32),
    Key("x_nv_gpudirect_clique", U8),
    Key("x_exclude_mmap_bars", integer_list(64)),
)
USER_DEVICE = Schema("--user-device", *PCI_KEYS, Key("socket", PATH, missing="socket missing"))
VDPA = Schema("--vdpa", *PCI_KEYS_IOMMU, Key("path", PATH, missing="path missing"), Key("num_queues", U64))
VSOCK = Schema(
    "--vsock",
    *PCI_KEYS_IOMMU,
    Key("socket", PATH, missing="socket missing"),
    Key("cid", U32, missing="cid missing"),
)
IVSHMEM = Schema(
    "--ivshmem",
    Key("path", PATH, missing="path missing"),
    Key("size", BYTE_SIZED, default=128 * MIB),
    *PCI_KEYS,
)
TPM = Schema("--tpm", Key("socket", PATH, missing="path missing"))


def parse_rng(text: str) -> RngConfig:
    """:raises OptionError: when `text` is not what `--rng` takes."""
    return RngConfig(**RNG.members(text))


def parse_rtc(text: str) -> RtcConfig:
    """:raises OptionError: when `text` is not what `--rtc` takes."""
    return RtcConfig(**RTC.members(text))


def parse_balloon(text: str) -> BalloonConfig:
    """:raises OptionError: when `text` is not what `--balloon` takes."""
    return BalloonConfig(**BALLOON.members(text))


def parse_fs(text: str) -> FsConfig:
    """:raises OptionError: when `text` is not what `--fs` takes."""
    return FsConfig(**FS.members(text))


def parse_generic_vhost_user(text: str) -> GenericVhostUserConfig:
    """:raises OptionError: when `text` is not what `--generic-vhost-user` takes."""
    members = GENERIC_VHOST_USER.members(text)
    legacy = members.pop("virtio_id", None)
    members["device_type"] = parse_device_type(members.get("device_type", legacy))
    return GenericVhostUserConfig(**members)


def parse_pmem(text: str) -> PmemConfig:
    """:raises OptionError: when `text` is not what `--pmem` takes."""
    return PmemConfig(**PMEM.members(text))


def parse_device(text: str) -> DeviceConfig:
    """:raises OptionError: when `text` is not what `--device` takes."""
    return DeviceConfig(**DEVICE.members(text))


def parse_user_device(text: str) -> UserDeviceConfig:
    """:raises OptionError: when `text` is not what `--user-device` takes."""
    return UserDeviceConfig(**USER_DEVICE.members(text))


def parse_vdpa(text: str) -> VdpaConfig:
    """:raises OptionError: when `text` is not what `--vdpa` takes."""
    return VdpaConfig(**VDPA.members(text))


def parse_vsock(text: str) -> VsockConfig:
    """:raises OptionError: when `text` is not what `--vsock` takes."""
    return VsockConfig(**VSOCK.members(text))


def parse_ivshmem(text: str) -> IvshmemConfig:
    """:raises OptionError: when `text` is not what `--ivshmem` takes."""
    return IvshmemConfig(**IVSHMEM.members(text))


def parse_tpm(text: str) -> TpmConfig:
    """:raises OptionError: when `text` is not what `--tpm` takes."""
    return TpmConfig(**TPM.members(text))
