"""Fuzz what the Python client hears from a server, ours or another, and how events look in every form.

What must hold: bytes give a reply, or BadReply, however they are cut; a stream gives events, a gap, or an
error of the client; a body is understood, or AnswerNotUnderstood; what a server complains of is an error with
readable texts. An event is the same behind its way through the stream, and JSON in the monitor's file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Hashable

import msgspec

from cloudvmm.client.chain import failure
from cloudvmm.client.codec import _DECODERS, decode
from cloudvmm.client.error import AnswerNotUnderstood, BadReply, ClientError, EventsLost
from cloudvmm.client.follow import Follower
from cloudvmm.client.reply import BODY_LIMIT_BYTES, HEAD_LIMIT_BYTES, Reply, ReplyParser
from cloudvmm.errors import error_chain
from cloudvmm.events.hub import Event
from cloudvmm.events.monitor import event_document, log_text, render_event
from cloudvmm.events.sse import event_frame
from json_tree import mutate_json
from named import cut, named_target, words_of
from runner import main

NAMES = [
    *("number", "timestamp", "secs", "nanos", "source", "event", "properties", "requested", "first", "next"),
    *("config", "state", "memory_actual_size", "device_tree", "id", "children", "resources", "PciBar", "bdf"),
    *("build_version", "version", "pid", "features", "clones", "jobs", "phase", "payload", "disks", "base"),
]


def _reply(raw: bytes) -> Hashable:
    whole, pieces = _fed([raw]), _fed(cut(raw))
    if isinstance(whole, tuple) and isinstance(pieces, tuple):
        assert whole == pieces, "the cuts changed the reply"
    return whole if isinstance(whole, str) else (whole[0], len(whole[1]) > 2, bool(whole[2]))


def _fed(pieces: list[bytes]) -> tuple[int, dict[str, str], bytes] | str:
    parser = ReplyParser()
    try:
        for piece in pieces:
            reply = parser.feed(piece)
            assert len(parser._received) <= HEAD_LIMIT_BYTES + BODY_LIMIT_BYTES
            if reply is not None:
                return reply.status, reply.headers, reply.body
        reply = parser.end()
    except BadReply as error:
        assert str(error)
        return str(error)[:16]
    if reply is None:
        return "nothing"
    assert 200 <= reply.status <= 999
    return reply.status, reply.headers, reply.body


def _stream(raw: bytes) -> Hashable:
    whole, pieces = _followed([raw]), _followed(cut(raw))
    assert whole[:1] == pieces[:1], "the cuts changed the events"
    return tuple(type(each).__name__ for each in whole[:4])


def _followed(pieces: list[bytes]) -> list[Event | str]:
    follower = Follower(None)
    seen: list[Event | str] = []
    for piece in pieces:
        try:
            follower.feed(piece)
            while True:
                try:
                    event = follower.take()
                except EventsLost as lost:
                    seen.append(f"gap {lost}"[:20])
                    continue
                if event is None:
                    break
                seen.append(event)
        except ClientError as error:
            seen.append(type(error).__name__)
            return seen
    assert follower.target().startswith("vm.events")
    return seen


def _body(raw: bytes) -> Hashable:
    """The first line is the kind of answer."""
    first, _, body = raw.partition(b"\n")
    kind = first.decode(errors="replace")
    if kind not in _DECODERS:
        return None
    try:
        value = decode("vm.info", kind, body)
    except AnswerNotUnderstood as error:
        return kind, words_of(error)
    return kind, type(value).__name__


def _failure(raw: bytes) -> Hashable:
    error = failure("vm.boot", Reply(500, {"content-type": "application/json"}, raw))
    chain = error_chain(error)
    assert str(error)
    return type(error).__name__, len(chain)


def _event(raw: bytes) -> Hashable:
    """Properties, as a VM's configuration may put any text into them."""
    try:
        properties = msgspec.json.decode(raw, type=dict[str, str])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    event = Event(number=7, monotonic_ns=10**9 + 5, source="vm", event="booted", properties=properties)
    text = render_event(event)
    assert text.endswith(b"}\n\n") and b"\n\n" not in text[:-2], "a reader would see two events"
    assert json.loads(text) == event_document(event)
    assert log_text(event).startswith("Event: source = vm event = booted ")
    follower = Follower(None)
    follower.feed(event_frame(event))
    assert follower.take() == event, "behind the stream it is another"
    assert follower.next_number == 8
    return len(properties)


def _mutate(raw: bytes, noise: random.Random) -> bytes:
    """Change the JSON in one line, behind its field if it has one."""
    lines = raw.split(b"\n")
    at = noise.randrange(len(lines))
    field, colon, value = lines[at].partition(b"data: ")
    if colon:
        lines[at] = field + colon + mutate_json(value, noise, NAMES)
    else:
        lines[at] = mutate_json(lines[at], noise, NAMES)
    return b"\n".join(lines)


TARGET = named_target(
    "server_answer",
    {"reply": _reply, "stream": _stream, "body": _body, "failure": _failure, "event": _event},
    words=(
        *(f'"{name}":'.encode() for name in NAMES),
        *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 204 \r\n", b"HTTP/1.1 100 \r\n\r\n", b"HTTP/1.0 500 \r\n"),
        *(b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"\r\n\r\n"),
        *(b"Content-Type: text/event-stream\r\n", b"data: ", b"event: ", b"id: ", b": ", b"\n\n", b"\r"),
        *(b"event: gap\n", b"event: end\n", b"Validation failed", b"The VM could not boot"),
    ),
    mutate=_mutate,
    share=0.12,
)

if __name__ == "__main__":
    main(TARGET)
