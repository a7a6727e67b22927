"""One packet of virtio-vsock: its header, and how it lies in the pieces of a buffer. No state."""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

HOST_CID: Final = 2
STREAM: Final = 1
HEADER: Final = struct.Struct("<QQIIIHHIII")
PAYLOAD_LIMIT: Final = 64 * 1024
NO_MORE_RECEIVING: Final = 1
NO_MORE_SENDING: Final = 2


class Operation(enum.IntEnum):
    """The values are the specification's."""

    REQUEST = 1
    RESPONSE = 2
    RESET = 3
    SHUTDOWN = 4
    DATA = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Header(NamedTuple):
    """In the order of the wire. `size` is that of the payload behind it, in bytes.

    `buffer_size` and `forwarded` are the sender's credit: how much it can keep for this stream, and how much
    of it (modulo 2**32) has left that again.
    """

    source_cid: int
    target_cid: int
    source_port: int
    target_port: int
    size: int
    kind: int
    operation: int
    flags: int
    buffer_size: int
    forwarded: int


def read_packet(pieces: Sequence[memoryview]) -> tuple[Header, list[memoryview]] | None:
    """Return the packet in `pieces`, its payload still in them; None where they do not hold one."""
    if sum(map(len, pieces)) < HEADER.size:
        return None
    if len(pieces[0]) >= HEADER.size:
        header = Header._make(HEADER.unpack_from(pieces[0]))
    else:
        header = Header._make(HEADER.unpack(b"".join(cut(pieces, 0, HEADER.size))))
    if header.size > PAYLOAD_LIMIT:
        return None
    payload = cut(pieces, HEADER.size, header.size) if header.size else []
    if sum(map(len, payload)) < header.size:
        return None
    return header, payload


def write_header(pieces: Sequence[memoryview], header: Header) -> None:
    """Write `header` to the beginning of `pieces`, which have room for it."""
    if len(pieces[0]) >= HEADER.size:
        HEADER.pack_into(pieces[0], 0, *header)
        return
    data, at = HEADER.pack(*header), 0
    for piece in cut(pieces, 0, HEADER.size):
        piece[:] = data[at : at + len(piece)]
        at += len(piece)


def cut(pieces: Sequence[memoryview], start: int, size: int) -> list[memoryview]:
    """Return `size` bytes of `pieces` from `start` on, or as many as there are."""
    found = []
    for piece in pieces:
        if start >= len(piece):
            start -= len(piece)
            continue
        part = piece[start : start + size]
        start = 0
        size -= len(part)
        found.append(part)
        if not size:
            break
    return found
