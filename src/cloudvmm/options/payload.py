"""`--fw-cfg-config`."""

from __future__ import annotations

from cloudvmm.config.payload import FwCfgConfig, FwCfgItem, FwCfgItemList
from cloudvmm.options.error import Conversion, GrammarError, ParseError
from cloudvmm.options.grammar import dequote, parse_options
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


_ITEMS = ValueType(_parse_items, syntax="[name=<item_name>,file=<path>:name=<item_name>,string=<text>]")

FW_CFG_CONFIG = Schema(
    "--fw-cfg-config items",
    Key("e820", TOGGLE),
    Key("kernel", TOGGLE),
    Key("cmdline", TOGGLE),
    Key("initramfs", TOGGLE),
    Key("acpi_table", TOGGLE, member="acpi_tables"),
    Key("items", _ITEMS),
)


def parse_fw_cfg_config(text: str) -> FwCfgConfig:
    """:raises OptionError: when `text` is not what `--fw-cfg-config` takes."""
    options = FW_CFG_CONFIG.parse(text)
    if options.is_set("items") and options.get("items") is None:
        raise ParseError(FW_CFG_CONFIG.what) from Conversion("items", "")
    return FwCfgConfig(**FW_CFG_CONFIG.convert(options))
