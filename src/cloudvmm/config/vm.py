"""VmConfig: everything that a VM is."""

from __future__ import annotations

import msgspec

from cloudvmm.config.console import (
    DEFAULT_DEBUG_CONSOLE_IOBASE,
    ConsoleConfig,
    ConsoleOutputMode,
    DebugConsoleConfig,
    SerialConfig,
)
from cloudvmm.config.cpu import CpusConfig
from cloudvmm.config.device import (
    BalloonConfig,
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    IvshmemConfig,
    PmemConfig,
    PvmemcontrolConfig,
    RngConfig,
    RtcConfig,
    TpmConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.landlock import LandlockConfig
from cloudvmm.config.memory import DEFAULT_MEMORY_SIZE_BYTES, MemoryConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.numa import NumaConfig
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.pci import PciSegmentConfig
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.rate_limit import RateLimiterGroupConfig

DEFAULT_RNG_SOURCE = "/dev/urandom"


def _default_cpus() -> CpusConfig:
    return CpusConfig(boot_vcpus=1, max_vcpus=1)


def _default_memory() -> MemoryConfig:
    return MemoryConfig(size=DEFAULT_MEMORY_SIZE_BYTES)


def _default_rng() -> RngConfig:
    return RngConfig(src=DEFAULT_RNG_SOURCE)


def _default_serial() -> SerialConfig:
    return SerialConfig(mode=ConsoleOutputMode.NULL)


def _default_console() -> ConsoleConfig:
    return ConsoleConfig(mode=ConsoleOutputMode.TTY)


def _default_debug_console() -> DebugConsoleConfig:
    return DebugConsoleConfig(mode=ConsoleOutputMode.OFF, iobase=DEFAULT_DEBUG_CONSOLE_IOBASE)


class VmConfig(msgspec.Struct, kw_only=True):
    """Everything that a VM is. What is not given has its default."""

    cpus: CpusConfig = msgspec.field(default_factory=_default_cpus)
    memory: MemoryConfig = msgspec.field(default_factory=_default_memory)
    payload: PayloadConfig | None = None
    rate_limit_groups: list[RateLimiterGroupConfig] | None = None
    disks: list[DiskConfig] | None = None
    net: list[NetConfig] | None = None
    rng: RngConfig = msgspec.field(default_factory=_default_rng)
    balloon: BalloonConfig | None = None
    generic_vhost_user: list[GenericVhostUserConfig] | None = None
    fs: list[FsConfig] | None = None
    pmem: list[PmemConfig] | None = None
    serial: SerialConfig = msgspec.field(default_factory=_default_serial)
    console: ConsoleConfig = msgspec.field(default_factory=_default_console)
    debug_console: DebugConsoleConfig = msgspec.field(default_factory=_default_debug_console)
    devices: list[DeviceConfig] | None = None
    user_devices: list[UserDeviceConfig] | None = None
    vdpa: list[VdpaConfig] | None = None
    vsock: VsockConfig | None = None
    pvmemcontrol: PvmemcontrolConfig | None = None
    pvpanic: bool = False
    iommu: bool = False
    numa: list[NumaConfig] | None = None
    watchdog: bool = False
    rtc: RtcConfig | None = None
    gdb: bool = False
    pci_segments: list[PciSegmentConfig] | None = None
    platform: PlatformConfig | None = None
    tpm: TpmConfig | None = None
    landlock_enable: bool = False
    landlock_rules: list[LandlockConfig] | None = None
    ivshmem: IvshmemConfig | None = None
