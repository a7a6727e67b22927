"""`--fw-cfg-config`."""

from __future__ import annotations

from cloudvmm.config.payload import FwCfgConfig, FwCfgItem, FwCfgItemList
from cloudvmm.options.error import Conversion, GrammarError, ParseError
from cloudvmm.options.grammar import dequote, enquote, parse_options
from cloudvmm.options.schema import Key, Schema
from cloudvmm.options.value import TOGGLE, ValueType


def _parse_items(text: str) -> FwCfgItemList:
    body = dequote(text).strip()
    if len(body) < 2 or body[0] != "[" or body[-1] != "]":
        raise ValueError(text)
    return FwCfgItemList(item_list=[_parse_item(item) for item in body[1:-1].split(":")])


def _parse_item(text: str) -> FwCfgItem:
    try:
        options = parse_options(text, ("name", "file", "string"))
    except GrammarError as error:
        raise ValueError(text) from error
    name = options.get("name")
    if name is None:
        raise ValueError(text)
    return FwCfgItem(name=name, file=options.get("file"), string=options.get("string"))


def _format_items(items: FwCfgItemList) -> str:
    body = f"[{':'.join(_format_item(item) for item in items.item_list)}]"
    # Quotes are read twice: around the whole, then around a value.
    return enquote(body) if '"' in body else body


def _format_item(item: FwCfgItem) -> str:
    members = (("name", item.name), ("file", item.file), ("string", item.string))
    return ",".join(f"{key}={enquote(value)}" for key, value in members if value is not None)


_ITEMS = ValueType(
    _parse_items, _format_items, syntax="[name=<item_name>,file=<path>:name=<item_name>,string=<text>]"
)

FW_CFG_CONFIG = Schema(
    "--fw-cfg-config items",
    FwCfgConfig,
    Key("e820", TOGGLE, "Whether to pass on the map of memory"),
    Key("kernel", TOGGLE, "Whether to pass on the kernel"),
    Key("cmdline", TOGGLE, "Whether to pass on the kernel's command line"),
    Key("initramfs", TOGGLE, "Whether to pass on the initramfs"),
    Key("acpi_table", TOGGLE, "Whether to pass on the ACPI tables", member="acpi_tables"),
    Key("items", _ITEMS, "Further items, each with a file or a string"),
)


def parse_fw_cfg_config(text: str) -> FwCfgConfig:
    """:raises OptionError: when `text` is not what `--fw-cfg-config` takes."""
    options = FW_CFG_CONFIG.parse(text)
    if options.is_set("items") and options.get("items") is None:
        raise ParseError(FW_CFG_CONFIG.what, hint=f"items={_ITEMS.syntax}") from Conversion("items", "")
    return FwCfgConfig(**FW_CFG_CONFIG.convert(options, FW_CFG_CONFIG.keys))


def format_fw_cfg_config(config: FwCfgConfig) -> str:
    """:raises Unprintable: no `--fw-cfg-config` gives `config`."""
    return FW_CFG_CONFIG.format(config, parse_fw_cfg_config)
