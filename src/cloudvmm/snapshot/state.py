"""`state.json`: what a snapshot knows beside the configuration. Pure: bytes to values and back.

The file is one JSON object. `format` says how to read the rest, `checksum` is the CRC-32 of the bytes of
`state` as they stand in the file. What a later release adds to `state` is ignored; what changes the meaning
of a member raises the format.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

import msgspec

from cloudvmm.config import form
from cloudvmm.engine.base import FrozenDisk
from cloudvmm.snapshot.error import DamagedSnapshot, ForeignState, NewerFormat

# What stands on images that must stay as they are has the higher one: an earlier release would write to them.
FORMAT: Final = 2
_PLAIN_FORMAT: Final = 1


class SavedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """Who wrote the files `engine-*`."""

    name: str
    version: str


class SavedFile(msgspec.Struct, frozen=True, kw_only=True):
    """`crc32` is None for a file too large to be read for it alone."""

    size_bytes: int
    crc32: int | None = None


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """`vm` is what the control room knows, in a form of its own; `files` are the engine's, by name.

    `device_tree` is that of `vm.info`, for whoever looks. `frozen_disks` are the images that belong to the
    snapshot, by the ids of disks: nobody must write to them.
    """

    program: str
    engine: SavedEngine
    vm: msgspec.Raw
    device_tree: dict[str, Any]
    files: dict[str, SavedFile]
    frozen_disks: dict[str, FrozenDisk] = {}


class _Envelope(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    checksum: int
    state: msgspec.Raw


class _Label(msgspec.Struct, frozen=True, kw_only=True):
    format: int


def encode_state(state: SavedState) -> bytes:
    raw = msgspec.json.encode(state)
    label = FORMAT if state.frozen_disks else _PLAIN_FORMAT
    return msgspec.json.encode(_Envelope(format=label, checksum=zlib.crc32(raw), state=msgspec.Raw(raw)))


def decode_state(raw: bytes) -> SavedState:
    """Read what `encode_state` wrote.

    :raises ForeignState: another program wrote it.
    :raises NewerFormat: a later release wrote it.
    :raises DamagedSnapshot: it is not JSON any more, or not what was written.
    """
    _check_label(raw)
    try:
        envelope: _Envelope = form.decoder(_Envelope).decode(raw)
        if zlib.crc32(envelope.state) != envelope.checksum:
            raise DamagedSnapshot("the checksum of state.json does not match")
        state: SavedState = form.decoder(SavedState).decode(envelope.state)
    except form.MALFORMED as error:
        raise DamagedSnapshot("state.json is not complete") from error
    return state


def _check_label(raw: bytes) -> None:
    try:
        # Skipped over, not built: what 16 MiB of brackets would become is a hundred times as large.
        form.decoder(msgspec.Raw).decode(raw)
    except form.MALFORMED as error:
        raise DamagedSnapshot("state.json is not JSON") from error
    try:
        found: int = form.decoder(_Label).decode(raw).format
    except msgspec.ValidationError:
        raise ForeignState from None
    if found > FORMAT:
        raise NewerFormat(found, FORMAT)
    if found < 1:
        raise ForeignState
