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
from cloudvmm.config.warning import Warn, unheard
from cloudvmm.options.error import FsTagTooLong, MissingKey
from cloudvmm.options.grammar import enquote
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
from cloudvmm.options.virtio_id import DEVICE_TYPE, parse_device_type

_FS_TAG_MAX_BYTES = 36


def _parse_tag(text: str) -> str:
    tag = TEXT.parse(text)
    if len(tag.encode(errors="surrogateescape")) > _FS_TAG_MAX_BYTES:
        raise FsTagTooLong
    return tag


RNG = Schema(
    "--rng",
    RngConfig,
    Key("src", PATH, "File that random bytes come from", default=DEFAULT_RNG_SOURCE),
    *PCI_KEYS_IOMMU,
)
RTC = Schema("--rtc", RtcConfig, *PCI_KEYS_IOMMU)
BALLOON = Schema(
    "--balloon",
    BalloonConfig,
    Key("size", BYTE_SIZED, "Memory to take from the guest", default=0),
    Key("deflate_on_oom", TOGGLE, "Whether the guest gets memory back when it runs out of it"),
    Key("free_page_reporting", TOGGLE, "Whether the host gets back what the guest has freed"),
    Key("statistics", TOGGLE, "Whether counters tell what the guest says of its memory"),
    *PCI_KEYS_IOMMU,
)
_FS_BACK_END_KEYS = (
    Key(
        "tag",
        ValueType(_parse_tag, enquote, syntax="<tag_name>"),
        "Name that the guest mounts; 36 bytes at most",
        missing="tag missing",
    ),
    Key("socket", PATH, "UNIX socket of virtiofsd"),
    Key("shared_dir", PATH, "Folder for which a virtiofsd is started, instead of a socket"),
)
_FS_QUEUE_KEYS = (
    Key("queue_size", U16, "Size of each queue, a power of two"),
    Key("num_queues", U64, "Number of queues"),
    *PCI_KEYS,
)
FS = Schema("--fs", FsConfig, *_FS_BACK_END_KEYS, *_FS_QUEUE_KEYS)
_GENERIC_KEYS = (
    Key("socket", PATH, "UNIX socket of the back end", missing="socket missing"),
    Key("queue_sizes", integer_list(16), "Size of each queue, powers of two", missing="queue size missing"),
    Key("virtio_id", TEXT, "Old name of device_type", is_old=True),
    Key("device_type", DEVICE_TYPE, "Kind of virtio device, by name or number"),
)
GENERIC_VHOST_USER = Schema("--generic-vhost-user", GenericVhostUserConfig, *_GENERIC_KEYS, *PCI_KEYS)
PMEM = Schema(
    "--pmem",
    PmemConfig,
    *PCI_KEYS_IOMMU,
    Key(
        "file", PATH, "File behind the memory; a folder gives a temporary file in it", missing="file missing"
    ),
    Key("size", BYTE_SIZED, "Size, a multiple of 2M; that of the file if not given"),
    Key("discard_writes", TOGGLE, "Whether the file stays as it is"),
)
DEVICE = Schema(
    "--device",
    DeviceConfig,
    *PCI_KEYS_IOMMU,
    Key("path", PATH, "Folder of the device in sysfs"),
    Key("fd", I32, "Open VFIO device, instead of path"),
    Key("x_nv_gpudirect_clique", U8, "Clique of devices that reach each other's memory (experimental)"),
    Key("x_exclude_mmap_bars", integer_list(64), "BARs, 0 to 5, that the guest does not map (experimental)"),
)
USER_DEVICE = Schema(
    "--user-device",
    UserDeviceConfig,
    *PCI_KEYS,
    Key("socket", PATH, "UNIX socket of the vfio-user server", missing="socket missing"),
)
VDPA = Schema(
    "--vdpa",
    VdpaConfig,
    *PCI_KEYS_IOMMU,
    Key("path", PATH, "vDPA device, such as /dev/vhost-vdpa-0", missing="path missing"),
    Key("num_queues", U64, "Number of queues"),
)
VSOCK = Schema(
    "--vsock",
    VsockConfig,
    *PCI_KEYS_IOMMU,
    Key("socket", PATH, "UNIX socket on the host's side", missing="socket missing"),
    Key("cid", U32, "Context identifier of the guest, 3 or above", missing="cid missing"),
)
IVSHMEM = Schema(
    "--ivshmem",
    IvshmemConfig,
    Key("path", PATH, "File that is shared with the guest", missing="path missing"),
    Key("size", BYTE_SIZED, "Size, a power of two", default=128 * MIB),
    *PCI_KEYS,
)
TPM = Schema(
    "--tpm",
    TpmConfig,
    Key("socket", PATH, "UNIX socket of swtpm's control channel"),
    Key("state_dir", PATH, "Folder with the state of a swtpm that is started, instead of a socket"),
)


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
    options = FS.parse(text)
    members = FS.convert(options, _FS_BACK_END_KEYS)
    if not members.keys() & {"socket", "shared_dir"}:
        raise MissingKey(FS.what, "socket missing", hint=FS.syntax)
    return FsConfig(**members, **FS.convert(options, _FS_QUEUE_KEYS))


def parse_generic_vhost_user(text: str, warn: Warn = unheard) -> GenericVhostUserConfig:
    """:raises OptionError: when `text` is not what `--generic-vhost-user` takes."""
    options = GENERIC_VHOST_USER.parse(text)
    members = GENERIC_VHOST_USER.convert(options, _GENERIC_KEYS[:3])
    legacy = members.pop("virtio_id", None)
    if legacy is not None:
        warn("'virtio_id' in --generic-vhost-user is deprecated; use 'device_type'.")
    given = options.get("device_type")
    members["device_type"] = parse_device_type(legacy if given is None else given)
    return GenericVhostUserConfig(**members, **GENERIC_VHOST_USER.convert(options, PCI_KEYS))


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
    members = TPM.members(text)
    if not members:
        raise MissingKey(TPM.what, "path missing", hint=TPM.syntax)
    return TpmConfig(**members)


def format_rng(rng: RngConfig) -> str:
    """:raises Unprintable: no `--rng` gives `rng`."""
    return RNG.format(rng, parse_rng)


def format_rtc(rtc: RtcConfig) -> str:
    """:raises Unprintable: no `--rtc` gives `rtc`."""
    return RTC.format(rtc, parse_rtc)


def format_balloon(balloon: BalloonConfig) -> str:
    """:raises Unprintable: no `--balloon` gives `balloon`."""
    return BALLOON.format(balloon, parse_balloon)


def format_fs(fs: FsConfig) -> str:
    """:raises Unprintable: no `--fs` gives `fs`."""
    return FS.format(fs, parse_fs)


def format_generic_vhost_user(device: GenericVhostUserConfig) -> str:
    """:raises Unprintable: no `--generic-vhost-user` gives `device`."""
    return GENERIC_VHOST_USER.format(device, parse_generic_vhost_user)


def format_pmem(pmem: PmemConfig) -> str:
    """:raises Unprintable: no `--pmem` gives `pmem`."""
    return PMEM.format(pmem, parse_pmem)


def format_device(device: DeviceConfig) -> str:
    """:raises Unprintable: no `--device` gives `device`."""
    return DEVICE.format(device, parse_device)


def format_user_device(device: UserDeviceConfig) -> str:
    """:raises Unprintable: no `--user-device` gives `device`."""
    return USER_DEVICE.format(device, parse_user_device)


def format_vdpa(vdpa: VdpaConfig) -> str:
    """:raises Unprintable: no `--vdpa` gives `vdpa`."""
    return VDPA.format(vdpa, parse_vdpa)


def format_vsock(vsock: VsockConfig) -> str:
    """:raises Unprintable: no `--vsock` gives `vsock`."""
    return VSOCK.format(vsock, parse_vsock)


def format_ivshmem(ivshmem: IvshmemConfig) -> str:
    """:raises Unprintable: no `--ivshmem` gives `ivshmem`."""
    return IVSHMEM.format(ivshmem, parse_ivshmem)


def format_tpm(tpm: TpmConfig) -> str:
    """:raises Unprintable: no `--tpm` gives `tpm`."""
    return TPM.format(tpm, parse_tpm)
