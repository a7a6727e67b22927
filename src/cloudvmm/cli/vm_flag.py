"""The VM that the command line describes.

What few VMs have is imported where a flag asks for it: this is on the way to the guest's first instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from cloudvmm.cli.error import ParsingConfig, ParsingRestore
from cloudvmm.config.device import GenericVhostUserConfig, PvmemcontrolConfig
from cloudvmm.config.error import ValidationError
from cloudvmm.config.landlock import InvalidLandlockAccess
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.rule import validate
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn, unheard
from cloudvmm.options.console import parse_console, parse_debug_console, parse_serial
from cloudvmm.options.cpu import parse_cpus
from cloudvmm.options.device import (
    parse_balloon,
    parse_device,
    parse_fs,
    parse_generic_vhost_user,
    parse_ivshmem,
    parse_pmem,
    parse_rng,
    parse_rtc,
    parse_tpm,
    parse_user_device,
    parse_vdpa,
    parse_vsock,
)
from cloudvmm.options.disk import parse_disk
from cloudvmm.options.error import OptionError, ValidationFailed
from cloudvmm.options.memory import parse_memory

if TYPE_CHECKING:
    from cloudvmm.cli.flag import Args
    from cloudvmm.config.landlock import LandlockConfig
    from cloudvmm.config.net import NetConfig
    from cloudvmm.config.numa import NumaConfig
    from cloudvmm.config.operation import RestoreConfig
    from cloudvmm.config.payload import FwCfgConfig
    from cloudvmm.config.pci import PciSegmentConfig
    from cloudvmm.config.platform import PlatformConfig
    from cloudvmm.config.rate_limit import RateLimiterGroupConfig

T = TypeVar("T")


def build_vm_config(args: Args, warn: Warn = unheard) -> VmConfig:
    """Read and validate every flag about the VM; what is allowed and perhaps not meant goes to `warn`.

    :raises ParsingConfig: caused by an OptionError, whose cause may be a rule that is broken.
    """
    try:
        vm_config = _read(args, warn)
        _validate(vm_config, warn)
    except OptionError as error:
        raise ParsingConfig from error
    return vm_config


def read_restore(text: str) -> RestoreConfig:
    """Read `--restore`; its rules are checked against the saved configuration, where it is carried out.

    :raises ParsingRestore: caused by an OptionError.
    """
    from cloudvmm.options.operation import parse_restore

    try:
        return parse_restore(text)
    except OptionError as error:
        raise ParsingRestore from error


def _validate(vm_config: VmConfig, warn: Warn) -> None:
    try:
        validate(vm_config, warn)
    except ValidationError as error:
        raise ValidationFailed(hint=_hint(error)) from error


def _hint(error: ValidationError) -> str | None:
    """Return what is allowed, for a rule whose text does not tell which flag it is about."""
    if not isinstance(error, InvalidLandlockAccess):
        return None
    from cloudvmm.options.platform import LANDLOCK_ACCESS_HINT

    return LANDLOCK_ACCESS_HINT


def _read(args: Args, warn: Warn) -> VmConfig:
    def generic_vhost_user(text: str) -> GenericVhostUserConfig:
        return parse_generic_vhost_user(text, warn)

    def platform(text: str) -> PlatformConfig:
        from cloudvmm.options.platform import parse_platform

        return parse_platform(text, warn)

    # Arguments are evaluated in this order, which is the reference's: the first fault is reported.
    return VmConfig(
        rate_limit_groups=_each(_rate_limit_group, args.rate_limit_group),
        disks=_each(parse_disk, args.disk),
        payload=_read_payload(args),
        net=_each(_net, args.net),
        rng=parse_rng(args.rng),
        rtc=_maybe(parse_rtc, args.rtc),
        balloon=_maybe(parse_balloon, args.balloon),
        pvmemcontrol=PvmemcontrolConfig() if args.pvmemcontrol else None,
        fs=_each(parse_fs, args.fs),
        generic_vhost_user=_each(generic_vhost_user, args.generic_vhost_user),
        pmem=_each(parse_pmem, args.pmem),
        console=parse_console(args.console),
        serial=parse_serial(args.serial),
        debug_console=parse_debug_console(args.debug_console),
        devices=_each(parse_device, args.device),
        user_devices=_each(parse_user_device, args.user_device),
        vdpa=_each(parse_vdpa, args.vdpa),
        vsock=_maybe(parse_vsock, args.vsock),
        pci_segments=_each(_pci_segment, args.pci_segment),
        platform=_maybe(platform, args.platform),
        numa=_each(_numa, args.numa),
        tpm=_maybe(parse_tpm, args.tpm),
        landlock_rules=_each(_landlock_rule, args.landlock_rules),
        ivshmem=_maybe(parse_ivshmem, args.ivshmem),
        cpus=parse_cpus(args.cpus),
        memory=parse_memory(args.memory, args.memory_zone),
        pvpanic=args.pvpanic,
        watchdog=args.watchdog,
        gdb=args.gdb is not None,
        landlock_enable=args.landlock,
    )


def _read_payload(args: Args) -> PayloadConfig | None:
    fw_cfg_config = _maybe(_fw_cfg_config, args.fw_cfg_config)
    if args.kernel is None and args.firmware is None and args.igvm is None:
        return None
    return PayloadConfig(
        firmware=args.firmware,
        kernel=args.kernel,
        cmdline=args.cmdline,
        initramfs=args.initramfs,
        igvm=args.igvm,
        host_data=args.host_data,
        fw_cfg_config=fw_cfg_config,
    )


def _rate_limit_group(text: str) -> RateLimiterGroupConfig:
    from cloudvmm.options.rate_limit import parse_rate_limit_group

    return parse_rate_limit_group(text)


def _net(text: str) -> NetConfig:
    from cloudvmm.options.net import parse_net

    return parse_net(text)


def _fw_cfg_config(text: str) -> FwCfgConfig:
    from cloudvmm.options.payload import parse_fw_cfg_config

    return parse_fw_cfg_config(text)


def _landlock_rule(text: str) -> LandlockConfig:
    from cloudvmm.options.platform import parse_landlock_rule

    return parse_landlock_rule(text)


def _numa(text: str) -> NumaConfig:
    from cloudvmm.options.platform import parse_numa

    return parse_numa(text)


def _pci_segment(text: str) -> PciSegmentConfig:
    from cloudvmm.options.platform import parse_pci_segment

    return parse_pci_segment(text)


def _each(parse: Callable[[str], T], texts: Sequence[str] | None) -> list[T] | None:
    return None if texts is None else [parse(text) for text in texts]


def _maybe(parse: Callable[[str], T], text: str | None) -> T | None:
    return None if text is None else parse(text)
