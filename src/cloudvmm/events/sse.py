"""Events as server-sent events, one frame each: what `vm.events` sends (docs/events.md). No I/O."""

from __future__ import annotations

from typing import Final

import msgspec

from cloudvmm.events.hub import Event
from cloudvmm.events.monitor import event_document

# A line that readers skip: it shows both ends that the other is there.
KEEP_ALIVE: Final = b":\n\n"


def position_frame(last_number: int) -> bytes:
    """Say that the event behind number `last_number` is the next one: no event by itself, but a place."""
    return b"id: %d\n\n" % last_number


def event_frame(event: Event) -> bytes:
    data = msgspec.json.encode({"number": event.number, **event_document(event)})
    name = f"{event.source}/{event.event}".encode()
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.number, name, data)


def gap_frame(*, requested: int, first: int) -> bytes:
    """Say that the stream cannot go on at the event `requested` and goes on at `first` instead."""
    return b'event: gap\ndata: {"requested":%d,"first":%d}\n\n' % (requested, first)


def end_frame(*, next_number: int) -> bytes:
    """Say that the stream is whole: no event `next_number` will come."""
    return b'event: end\ndata: {"next":%d}\n\n' % next_number
