"""`state.json`: what is written is read; what is not ours, newer or damaged says so."""

from __future__ import annotations

import zlib

import msgspec
import pytest

from cloudvmm.api.data import DeviceNode
from cloudvmm.snapshot.error import DamagedSnapshot, ForeignState, NewerFormat
from cloudvmm.snapshot.state import (
    SavedEngine,
    SavedFile,
    SavedState,
    decode_state,
    encode_state,
)

STATE = SavedState(
    program="cloudvmm 1",
    engine=SavedEngine(name="fake", version="1"),
    vm=msgspec.Raw(b'{"counter":1}'),
    device_tree={"_disk0": DeviceNode(id="_disk0", resources=[], children=[])},
    files={"engine-a": SavedFile(size_bytes=3, crc32=9), "engine-ram": SavedFile(size_bytes=1 << 40)},
)


def wrapped(state: bytes, format_version: object = 1) -> bytes:
    return b'{"format":%s,"checksum":%d,"state":%s}' % (
        msgspec.json.encode(format_version),
        zlib.crc32(state),
        state,
    )


def test_state_comes_out_as_it_went_in():
    decoded = decode_state(encode_state(STATE))

    assert msgspec.structs.replace(decoded, device_tree={}) == msgspec.structs.replace(STATE, device_tree={})
    assert decoded.device_tree["_disk0"]["id"] == "_disk0"


def test_member_that_a_later_release_added_is_ignored():
    raw = msgspec.json.decode(msgspec.json.encode(STATE)) | {"later": 1}
    assert decode_state(wrapped(msgspec.json.encode(raw))).program == "cloudvmm 1"


@pytest.mark.parametrize("at", [0.3, 0.6, 0.99])
def test_state_that_was_cut_off_is_damaged(at):
    raw = encode_state(STATE)
    with pytest.raises(DamagedSnapshot):
        decode_state(raw[: int(len(raw) * at)])


def test_every_changed_byte_of_the_state_is_noticed():
    raw = encode_state(STATE)
    start = raw.index(b'"state":') + len(b'"state":')
    for index in range(start, len(raw) - 1):
        with pytest.raises(DamagedSnapshot):
            decode_state(raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :])


@pytest.mark.parametrize("raw", [b"{}", b"[]", b"1", b'{"format":"1"}', b'{"format":0}', b'{"snapshots":{}}'])
def test_state_of_another_program_says_so(raw):
    with pytest.raises(ForeignState):
        decode_state(raw)


def test_newer_format_names_both():
    with pytest.raises(NewerFormat, match="has format 3, this release reads 2"):
        decode_state(b'{"format":3,"anything":[]}')


@pytest.mark.parametrize("raw", [b"", b"\xff", b"nonsense", b"[" * 100_000])
def test_what_is_not_json_is_damaged(raw):
    with pytest.raises(DamagedSnapshot):
        decode_state(raw)


def test_state_that_lacks_a_member_is_damaged():
    with pytest.raises(DamagedSnapshot, match="not complete"):
        decode_state(wrapped(b'{"program":"x"}'))
