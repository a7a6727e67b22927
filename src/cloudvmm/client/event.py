"""The data of a stream's frames into events. Apart from `follow.py`, since it needs msgspec."""

from __future__ import annotations

import msgspec

from cloudvmm.client.error import BadReply, EventsLost
from cloudvmm.events.hub import Event

_NANOSECONDS = 1_000_000_000


class _Timestamp(msgspec.Struct):
    secs: int
    nanos: int


class _Document(msgspec.Struct):
    number: int
    timestamp: _Timestamp
    source: str
    event: str
    properties: dict[str, str] | None = None


class _Gap(msgspec.Struct):
    requested: int
    first: int


_event_decoder = msgspec.json.Decoder(_Document)
_gap_decoder = msgspec.json.Decoder(_Gap)


def decode_event(data: str) -> Event:
    """:raises BadReply: it is not an event."""
    try:
        document = _event_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadReply(f"This is not an event: {data[:80]!r}") from error
    return Event(
        number=document.number,
        monotonic_ns=document.timestamp.secs * _NANOSECONDS + document.timestamp.nanos,
        source=document.source,
        event=document.event,
        properties=document.properties,
    )


def decode_gap(data: str) -> EventsLost:
    """:raises BadReply: it is not what a gap tells."""
    try:
        gap = _gap_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadReply(f"This is not a gap: {data[:80]!r}") from error
    return EventsLost(gap.requested, gap.first)
