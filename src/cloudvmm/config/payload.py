"""What the VM starts: a kernel, or a firmware."""

from __future__ import annotations

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.warning import Warn, unheard
from cloudvmm.errors import VmmError


class FwCfgItem(msgspec.Struct, kw_only=True):
    name: str = ""
    file: str | None = None
    string: str | None = None


class FwCfgItemList(msgspec.Struct, kw_only=True):
    item_list: list[FwCfgItem] = msgspec.field(default_factory=list)


class FwCfgConfig(msgspec.Struct, kw_only=True):
    e820: bool = True
    kernel: bool = True
    cmdline: bool = True
    initramfs: bool = True
    acpi_tables: bool = True
    items: FwCfgItemList | None = None


class PayloadConfig(msgspec.Struct, kw_only=True):
    firmware: str | None = None
    kernel: str | None = None
    cmdline: str | None = None
    initramfs: str | None = None
    igvm: str | None = None
    host_data: str | None = None
    fw_cfg_config: FwCfgConfig | None = None


class PayloadNotBootable(ValidationError):
    """Payload configuration is not bootable"""


class PayloadConfigError(VmmError):
    """Why a payload is not bootable; always the cause of a PayloadNotBootable."""


class MissingBootitem(PayloadConfigError):
    """No bootitem provided: neither firmware nor kernel"""


class FirmwarePlusOtherPayloads(PayloadConfigError):
    """Specifying a kernel is not supported when a firmware is provided"""


class IgvmPlusOtherPayloads(PayloadConfigError):
    """Specifying a kernel or firmware is not supported when an igvm is provided"""


class FwCfgMissingKernel(PayloadConfigError):
    """Error --fw-cfg-config: missing --kernel"""


class FwCfgMissingCmdline(PayloadConfigError):
    """Error --fw-cfg-config: missing --cmdline"""


class FwCfgMissingInitramfs(PayloadConfigError):
    """Error --fw-cfg-config: missing --initramfs"""


class FwCfgInvalidItem(PayloadConfigError):
    def __init__(self, name: str) -> None:
        super().__init__(
            f"Error --fw-cfg-config: invalid item '{name}' (exactly one of 'file' or 'string' is required)"
        )


def settle_payload(payload: PayloadConfig | None, warn: Warn = unheard) -> None:
    """Check that `payload` can boot, and erase, with a warning, what a firmware would ignore.

    :raises PayloadNotBootable: with a PayloadConfigError as its cause.
    """
    try:
        _settle(payload, warn)
    except PayloadConfigError as error:
        raise PayloadNotBootable from error


def _settle(payload: PayloadConfig | None, warn: Warn) -> None:
    if payload is None:
        raise MissingBootitem
    if payload.igvm is not None:
        if payload.firmware is not None:
            raise IgvmPlusOtherPayloads
        return
    if payload.firmware is None and payload.kernel is None:
        raise MissingBootitem
    if payload.firmware is not None:
        if payload.kernel is not None:
            raise FirmwarePlusOtherPayloads
        _erase_beside_firmware(payload, warn)
    if payload.fw_cfg_config is not None:
        _check_fw_cfg(payload.fw_cfg_config, payload)


def _erase_beside_firmware(payload: PayloadConfig, warn: Warn) -> None:
    for member in ("cmdline", "initramfs"):
        if getattr(payload, member) is not None:
            warn(f"Ignoring {member} parameter as firmware is provided as the payload")
            setattr(payload, member, None)


def _check_fw_cfg(fw_cfg: FwCfgConfig, payload: PayloadConfig) -> None:
    if fw_cfg.kernel and payload.kernel is None:
        raise FwCfgMissingKernel
    if fw_cfg.cmdline and payload.cmdline is None:
        raise FwCfgMissingCmdline
    if fw_cfg.initramfs and payload.initramfs is None:
        raise FwCfgMissingInitramfs
    for item in fw_cfg.items.item_list if fw_cfg.items else ():
        if (item.file is None) == (item.string is None):
            raise FwCfgInvalidItem(item.name)
