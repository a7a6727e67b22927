"""QMP's grammar: lines in any cut, and whatever else may come over a socket."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudvmm.engine.qemu.codec import (
    Event,
    Greeting,
    MessageBuffer,
    QmpGarbage,
    Refusal,
    Reply,
    decode_line,
    encode_command,
)

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": []}}'
EVENT = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}'
REPLY = b'{"return": {"running": false}, "id": 3}'
REFUSAL = b'{"id": 4, "error": {"class": "GenericError", "desc": "No such thing"}}'
STREAM = b"\r\n".join((GREETING, EVENT, REPLY, REFUSAL)) + b"\r\n"
MESSAGES = [
    Greeting((10, 0, 2)),
    Event("STOP", {}, 1_000_002),
    Reply(3, {"running": False}),
    Refusal(4, "GenericError", "No such thing"),
]


def test_command_is_one_line_of_json():
    line = encode_command("cont", command_id=7)

    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line) == {"execute": "cont", "id": 7}


def test_line_break_in_an_argument_stays_inside_the_line():
    line = encode_command("getfd", {"fdname": "a\nb"}, command_id=1)

    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line)["arguments"] == {"fdname": "a\nb"}


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=8))
def test_messages_are_the_same_however_the_stream_is_cut(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    buffer = MessageBuffer()
    seen = []

    for start, end in itertools.pairwise(edges):
        buffer.feed(STREAM[start:end])
        seen += list(buffer)

    assert seen == MESSAGES


def test_messages_fed_before_the_first_is_taken_keep_their_order():
    buffer = MessageBuffer()
    buffer.feed(STREAM)
    buffer.feed(STREAM)

    assert list(buffer) == MESSAGES * 2


def test_half_a_line_is_no_message():
    buffer = MessageBuffer()
    buffer.feed(EVENT)

    assert buffer.take() is None


def test_return_of_null_and_of_false_are_replies():
    assert decode_line(b'{"return": null, "id": 1}') == Reply(1, None)
    assert decode_line(b'{"return": false, "id": 1}') == Reply(1, False)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"{}",
        b'{"event": 5}',
        b'{"id": "x", "return": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_anything_else_is_garbage(line):
    with pytest.raises(QmpGarbage):
        decode_line(line)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_a_message_or_garbage(data):
    buffer = MessageBuffer()
    buffer.feed(data + b"\n")

    try:
        messages = list(buffer)
    except QmpGarbage:
        messages = []

    assert all(isinstance(message, Greeting | Event | Reply | Refusal) for message in messages)


def test_endless_line_is_garbage(monkeypatch):
    monkeypatch.setattr("cloudvmm.engine.qemu.codec.MAX_LINE_BYTES", 1000)
    buffer = MessageBuffer()
    buffer.feed(b"x" * 1000)

    with pytest.raises(QmpGarbage):
        buffer.feed(b"x")
