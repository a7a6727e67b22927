"""What the VM starts: a kernel, or a firmware."""

from __future__ import annotations

import msgspec


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
