"""The text of a flat VMDK: which files, from where on, are its disk. Pure.

Such an image is a short text that names extents. Two of its kinds are known: one extent, or one every 2 GB.
"""

from __future__ import annotations

from typing import Final

import msgspec

VMDK_HEADER: Final = "# Disk DescriptorFile"
_EXTENTS: Final = "# Extent description"
_DATABASE: Final = ("# The Disk Data Base", "#DDB")
_KINDS: Final = ("monolithicFlat", "twoGbMaxExtentFlat")
_ACCESSES: Final = ("RW", "RDONLY", "NOACCESS")
_LARGEST: Final = 2**64 - 1


class VmdkExtent(msgspec.Struct, frozen=True):
    """`sectors` of the disk are in the file `name`, from its sector `offset` on."""

    access: str
    sectors: int
    name: str
    offset: int


def flat_extents(text: str) -> list[VmdkExtent] | None:
    """Return the extents of the disk in order; None where `text` does not describe a flat VMDK."""
    header, *lines = (line.removesuffix("\r") for line in text.split("\n"))
    if header.rstrip() != VMDK_HEADER:
        return None
    at = next((number for number, line in enumerate(lines) if line.startswith("#")), len(lines))
    if _kind(lines[:at]) not in _KINDS or lines[at : at + 1] != [_EXTENTS]:
        return None
    extents: list[VmdkExtent] = []
    for line in lines[at + 1 :]:
        if line.startswith("#"):
            return extents if line in _DATABASE else None
        if line.strip():
            extent = _extent(line.split())
            if extent is None:
                return None
            extents.append(extent)
    return extents


def _kind(lines: list[str]) -> str | None:
    kind = None
    for line in lines:
        name, *values = (part.strip() for part in line.split("="))
        if name == "createType" and len(values) == 1:
            kind = values[0].strip('"')
    return kind


def _extent(words: list[str]) -> VmdkExtent | None:
    if len(words) not in (4, 5):
        return None
    access, sectors, kind, name, *rest = words
    offset = rest[0] if rest else "0"
    if access not in _ACCESSES or kind != "FLAT" or not (_is_number(sectors) and _is_number(offset)):
        return None
    return VmdkExtent(access, int(sectors), name.strip('"'), int(offset))


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= len(str(_LARGEST)) and int(word) <= _LARGEST
