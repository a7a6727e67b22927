"""Packets in the pieces of a buffer, however those are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudvmm.vsock.packet import HEADER, PAYLOAD_LIMIT, Header, cut, read_packet, write_header

EXAMPLE = Header(3, 2, 1000, 2000, 5, 1, 5, 0, 65536, 7)


def pieces_of(data: bytes, sizes: list[int]) -> list[memoryview]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(memoryview(bytearray(data[at : at + size])))
        at += size
    return [*pieces, memoryview(bytearray(data[at:]))]


def joined(pieces: list[memoryview]) -> bytes:
    return b"".join(pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=6), st.binary(max_size=100))
def test_packet_is_read_wherever_its_buffer_is_cut(sizes, payload):
    header = EXAMPLE._replace(size=len(payload))
    found = read_packet(pieces_of(HEADER.pack(*header) + payload + b"more", sizes))
    assert found is not None
    assert found[0] == header
    assert joined(found[1]) == payload


@settings(deadline=None)
@given(st.lists(st.integers(0, 60), max_size=6))
def test_header_is_written_wherever_its_buffer_is_cut(sizes):
    pieces = pieces_of(bytes(100), sizes)
    write_header(pieces, EXAMPLE)
    assert joined(pieces) == HEADER.pack(*EXAMPLE) + bytes(100 - HEADER.size)


@settings(deadline=None)
@given(
    st.binary(max_size=80), st.lists(st.integers(0, 20), max_size=8), st.integers(0, 90), st.integers(1, 90)
)
def test_cut_is_the_slice(data, sizes, start, size):
    assert joined(cut(pieces_of(data, sizes), start, size)) == data[start : start + size]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        HEADER.pack(*EXAMPLE)[:-1],
        HEADER.pack(*EXAMPLE) + b"1234",
        HEADER.pack(*EXAMPLE._replace(size=0xFFFFFFFF)) + b"12345",
        HEADER.pack(*EXAMPLE._replace(size=PAYLOAD_LIMIT + 1)) + bytes(PAYLOAD_LIMIT + 1),
    ],
    ids=["nothing", "short-header", "short-payload", "huge", "over-the-limit"],
)
def test_buffer_that_holds_no_packet_is_passed_over(data):
    assert read_packet([memoryview(data)]) is None
    assert read_packet([]) is None
