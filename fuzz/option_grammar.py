"""Fuzz the option strings: the first line is a flag without its dashes, the rest is what it is given.

What must hold: a string gives a struct, or an OptionError whose chain reads as text and whose outermost error
names the flag; splitting at commas loses nothing; a struct is written as a string that gives it again; one
whose text is UTF-8 is the same after JSON.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Hashable
from typing import Any

from cloudvmm.config import form
from cloudvmm.errors import error_chain, json_text
from cloudvmm.options import console, cpu, device, disk, memory, net, operation, payload, platform, rate_limit
from cloudvmm.options.error import GrammarError, OptionError
from cloudvmm.options.grammar import split_commas
from cloudvmm.options.table import SCHEMAS
from runner import Target, main

FLAG_PARSERS: dict[str, Callable[[str], Any]] = {
    "balloon": device.parse_balloon,
    "console": console.parse_console,
    "cpus": cpu.parse_cpus,
    "debug-console": console.parse_debug_console,
    "device": device.parse_device,
    "disk": disk.parse_disk,
    "fs": device.parse_fs,
    "fw-cfg-config": payload.parse_fw_cfg_config,
    "generic-vhost-user": device.parse_generic_vhost_user,
    "ivshmem": device.parse_ivshmem,
    "landlock-rules": platform.parse_landlock_rule,
    "memory": memory.parse_memory,
    "memory-zone": memory.parse_memory_zone,
    "net": net.parse_net,
    "numa": platform.parse_numa,
    "pci-segment": platform.parse_pci_segment,
    "platform": platform.parse_platform,
    "pmem": device.parse_pmem,
    "rate-limit-group": rate_limit.parse_rate_limit_group,
    "restore": operation.parse_restore,
    "rng": device.parse_rng,
    "rtc": device.parse_rtc,
    "serial": console.parse_serial,
    "tpm": device.parse_tpm,
    "user-device": device.parse_user_device,
    "vdpa": device.parse_vdpa,
    "vsock": device.parse_vsock,
}
PARSERS = FLAG_PARSERS | {
    "receive-migration": operation.parse_receive_migration,
    "send-migration": operation.parse_send_migration,
}
_WRITERS: dict[str, Callable[[Any], str]] = {
    name: getattr(sys.modules[parse.__module__], parse.__name__.replace("parse_", "format_"))
    for name, parse in PARSERS.items()
}
_NAMES = sorted({key.name for schema in SCHEMAS.values() for key in schema.keys})
_CHOICES = sorted({word for schema in SCHEMAS.values() for key in schema.keys for word in key.kind.choices})
# Descriptors mean nothing to another process, so their numbers do not outlive JSON.
_WITH_DESCRIPTORS = frozenset(("device", "net", "platform", "receive-migration", "restore"))


def check(data: bytes) -> Hashable:
    """:raises Exception: a promise is broken."""
    flag, _, given = data.partition(b"\n")
    name = flag.decode(errors="replace")
    parse = PARSERS.get(name)
    if parse is None or b"\0" in given:  # no argument of a program can hold a NUL
        return None
    text = given.decode(errors="surrogateescape")  # as sys.argv has it
    _check_commas(text)
    try:
        value = parse(text)
    except OptionError as error:
        return name, _check_refusal(error)
    _check_written(name, value)
    return name, _check_json(name, value)


def _check_commas(text: str) -> None:
    try:
        parts = split_commas(text)
    except GrammarError:
        return
    assert ",".join(parts) == text.strip(), "splitting lost something"


def _check_refusal(error: OptionError) -> Hashable:
    chain = error_chain(error)
    assert all(text and json_text(text).encode() for text in chain)
    assert not isinstance(error, GrammarError), "nobody says which flag it was"
    key = re.search(r" for (\w+)$", chain[-1])
    return type(error).__name__, type(error.__cause__).__name__, key and key[1]


def _check_written(name: str, value: Any) -> None:
    if name == "memory":
        written, zones = memory.format_memory(value)
        again = memory.parse_memory(written, zones)
    else:
        again = PARSERS[name](_WRITERS[name](value))
    assert again == value, f"{again} is what is written of {value}"


def _check_json(name: str, value: Any) -> Hashable:
    try:
        raw = form.encode(value)
    except UnicodeEncodeError:
        return "not UTF-8"
    kind = type(value)
    again = form.decode_saved(raw, kind)
    if name not in _WITH_DESCRIPTORS:
        assert again == value, f"{again} is what is left of {value}"
    fresh = kind.__struct_defaults__
    return tuple(
        field
        for field, default in zip(kind.__struct_fields__[-len(fresh) :], fresh, strict=False)
        if getattr(value, field) != default
    )


TARGET = Target(
    "option_grammar",
    check,
    words=tuple(
        word.encode()
        for word in (
            *(f"{name}=" for name in _NAMES),
            *(f",{name}=" for name in _NAMES),
            *_CHOICES,
            *(
                "[1,3-5]",
                "[0@[1-2],1@[0]]",
                '"a,b"',
                "=[",
                "1:2:3:4",
                "512M",
                "4G",
                "on",
                "off",
                "tty",
                "null",
            ),
            *(f"{flag}\n" for flag in PARSERS),
        )
    ),
)

if __name__ == "__main__":
    main(TARGET)
