"""Whether the texts of a configuration can be handed on: as JSON, which is UTF-8, or as bytes of the host.

What a command line holds need not be UTF-8; Python keeps such bytes as lone surrogates. A path or the guest's
command line may be so, anything else may not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from cloudvmm.engine.base import EngineError

# Opened by us, or handed to QEMU as an argument and not as JSON.
_BYTES_MEMBERS: Final = frozenset(
    {"path", "src", "file", "kernel", "initramfs", "firmware", "cmdline", "shared_dir", "state_dir"}
)


class TextNotUtf8(EngineError):
    def __init__(self, member: str) -> None:
        super().__init__(f"The text of {member} in the configuration is not UTF-8")
        self.member = member


def check_texts(config: msgspec.Struct) -> None:
    """Raise where a text cannot be handed on.

    :raises TextNotUtf8: with the member, such as ``disks[0].serial``.
    """
    for member, text in _texts(config, ""):
        is_bytes = member.rpartition(".")[2] in _BYTES_MEMBERS
        try:
            os.fsencode(text) if is_bytes else text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TextNotUtf8(member) from error


def is_utf8(text: str) -> bool:
    """Say whether `text` can be a part of JSON."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _texts(value: object, where: str) -> Iterator[tuple[str, str]]:
    """Give each text in `value` with the way to it."""
    members: Iterable[tuple[str, object]] = ()
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, msgspec.Struct):
        prefix = f"{where}." if where else ""
        members = ((f"{prefix}{name}", getattr(value, name)) for name in value.__struct_fields__)
    elif isinstance(value, list | tuple):
        members = ((f"{where}[{index}]", each) for index, each in enumerate(value))
    for name, member in members:
        yield from _texts(member, name)
