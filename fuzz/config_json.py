"""Fuzz the bodies of requests: the first line is the name of a command, the rest is its JSON.

What must hold: decoding gives a value or a DecodeError; a value written and read again is the same, to the
byte; validation gives a ValidationError or leaves a configuration that holds, and holds again; and what is
decoded is what the document allows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Hashable

import msgspec

from answered import check_answered
from cloudvmm.api import COMMANDS
from cloudvmm.config import form
from cloudvmm.config.error import DecodeError, ValidationError
from cloudvmm.config.rule import validate
from cloudvmm.config.vm import VmConfig
from cloudvmm.errors import error_chain, json_text
from cloudvmm.http.path import ROOT
from cloudvmm.wire.http import Request
from json_tree import mutate_json
from runner import Target, main

KINDS = {command.name: command.body for command in COMMANDS if command.body is not None}


def _members(annotation: object) -> set[str]:
    """Return the names of all members of the structs in `annotation`, and of what those hold."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        fields = msgspec.structs.fields(annotation)
        return {field.name for field in fields}.union(*(_members(field.type) for field in fields))
    return set().union(*map(_members, getattr(annotation, "__args__", ())))


_OLD_NAMES = {"kernel", "initramfs", "cmdline", "args", "tdx", "serial_number", "uuid", "sgx_epc"}
NAMES = sorted(_OLD_NAMES.union(*map(_members, KINDS.values())))


def check(data: bytes) -> Hashable:
    """:raises Exception: a promise is broken."""
    name, _, raw = data.partition(b"\n")
    kind = KINDS.get(name.decode(errors="replace"))
    if kind is None:
        return None
    check_answered(Request("PUT", ROOT + name.decode(), raw or None))
    try:
        value = form.decode(raw, kind)
    except DecodeError as error:
        return name, _words(error)
    _check_again(value, kind)
    if not isinstance(value, VmConfig):
        return name, _shape(value)
    try:
        validate(value)
    except ValidationError as error:
        return name, _words(error)
    _check_again(value, kind)
    before = form.encode(value)
    validate(value)
    assert form.encode(value) == before, "what holds is changed when it is checked again"
    return name, _shape(value)


def _check_again(value: msgspec.Struct, kind: type) -> None:
    raw = form.encode(value)
    again = form.decode(raw, kind)
    assert again == value, f"{again} is what is left of {value}"
    assert form.encode(again) == raw, "the second time it reads otherwise"
    assert form.decode_saved(raw, kind) == again or b"fd" in raw, "what is saved is something else"


def _words(error: Exception) -> Hashable:
    chain = error_chain(error)
    assert all(text and json_text(text).encode() for text in chain)
    return type(error).__name__, re.sub(r"\d+|['`(][^'`)]*['`)]", "", chain[0])[:50]


def _shape(value: msgspec.Struct) -> Hashable:
    """Which members differ from their defaults, one level deep."""
    shown = []
    for field in msgspec.structs.fields(type(value)):
        inner = getattr(value, field.name)
        default = None if field.default is msgspec.NODEFAULT else field.default
        if inner != default and inner not in ([], None):
            shown.append(field.name)
    return tuple(shown)


def _mutate(data: bytes, noise: random.Random) -> bytes:
    name, _, raw = data.partition(b"\n")
    if noise.random() < 0.05:
        name = noise.choice(sorted(KINDS)).encode()
    return name + b"\n" + mutate_json(raw, noise, NAMES)


TARGET = Target(
    "config_json",
    check,
    words=tuple(f'"{name}":'.encode() for name in NAMES) + tuple(f"{name}\n".encode() for name in KINDS),
    mutate=_mutate,
)

if __name__ == "__main__":
    main(TARGET)
