"""Fuzz the QMP codec: any bytes that a QEMU could send, cut in any way, and any command that we could.

What must hold: bytes give messages or QmpGarbage, nothing else; the messages before the garbage are the same
however the bytes are cut; each is what a plain JSON parser reads in its line; a command is one line that
reads back, or is refused for text that is no UTF-8 (`engine/qemu/text.py` looks for that first).
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from cloudvmm.engine.qemu.codec import (
    Event,
    Greeting,
    Message,
    MessageBuffer,
    QmpGarbage,
    Refusal,
    Reply,
    encode_command,
)
from json_tree import mutate_json
from named import cut
from runner import Target, main

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.any_json import load_json

NAMES = ["QMP", "event", "data", "return", "error", "class", "desc", "id", "timestamp", "version", "qemu"]


def check(data: bytes) -> Hashable:
    """:raises Exception: a promise is broken."""
    whole = feed_all([data])
    assert feed_all(cut(data)) == whole, "the cuts changed the messages"
    messages, is_garbage = whole
    lines = [line for line in data.split(b"\n")[:-1] if line.strip()]
    for message, line in zip(messages, lines, strict=False):
        # What is no UTF-8 is in a part that nobody reads.
        check_message(message, load_json(line.decode(errors="replace")))
    check_command(lines)
    return tuple(describe(message) for message in messages[:4]), is_garbage


def feed_all(pieces: list[bytes]) -> tuple[list[Message], bool]:
    """Return the messages, and whether garbage ended them."""
    buffer = MessageBuffer()
    messages: list[Message] = []
    try:
        for piece in pieces:
            buffer.feed(piece)
            messages.extend(buffer)  # what comes before garbage is kept
    except QmpGarbage as error:
        assert str(error)
        return messages, True
    return messages, False


def check_message(message: Message, document: dict[str, Any]) -> None:
    match message:
        case Event():
            assert message.name == document["event"]
            assert message.data == document.get("data", {})
        case Refusal():
            assert message.command_id == document.get("id")
            assert message.description == (document["error"].get("desc", ""))
        case Reply():
            assert message.command_id == document.get("id")
            assert message.value == document["return"]
        case Greeting():
            assert message.version[0] == document["QMP"]["version"]["qemu"]["major"]


def check_command(lines: list[bytes]) -> None:
    """Send what came in as arguments of a command."""
    for number, line in enumerate(lines):
        try:
            arguments = json.loads(line)
            json.dumps(arguments, allow_nan=False)  # we send no infinite numbers
        except (ValueError, RecursionError):
            continue
        if not isinstance(arguments, dict):
            continue
        try:
            raw = encode_command("x", arguments, command_id=number)
        except UnicodeEncodeError:
            assert "\\ud" in repr(arguments), "all of it is UTF-8"
            continue
        assert raw.endswith(b"\n")
        assert raw.count(b"\n") == 1
        sent = json.loads(raw)
        assert sent == {"execute": "x", "id": number} | ({"arguments": arguments} if arguments else {})


def describe(message: Message) -> Hashable:
    match message:
        case Event():
            return "event", len(message.name) > 20, len(message.data)
        case Reply():
            return "reply", message.command_id is None, type(message.value).__name__
        case Refusal():
            return "refusal", message.command_id is None, len(message.error_class) > 20
        case Greeting():
            return "greeting"


def _mutate(data: bytes, noise: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = noise.randrange(len(lines))
    lines[at] = mutate_json(lines[at], noise, NAMES)
    return b"\n".join(lines)


TARGET = Target("qmp_codec", check, words=tuple(f'"{name}":'.encode() for name in NAMES), mutate=_mutate)

if __name__ == "__main__":
    main(TARGET)
