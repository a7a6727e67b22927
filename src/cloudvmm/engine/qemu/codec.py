"""The grammar of QMP: bytes to messages and back. Pure; the socket is in `qmp.py`.

QEMU writes one JSON object per line. Three kinds arrive after the greeting: a reply (``return`` or
``error``, with the ``id`` of the command) and an event. Anything else is garbage and ends the
conversation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from cloudvmm.engine.base import EngineError

MAX_LINE_BYTES = 64 * 1024 * 1024


class QmpGarbage(EngineError):
    """QEMU sent something that is not QMP"""


class Greeting(msgspec.Struct, frozen=True):
    """`version` is (major, minor, micro)."""

    version: tuple[int, int, int]


class Event(msgspec.Struct, frozen=True):
    """`at` is when it happened, in microseconds since 1970 by QEMU's clock."""

    name: str
    data: dict[str, Any]
    at: int = 0


class Reply(msgspec.Struct, frozen=True):
    command_id: int | None
    value: Any


class Refusal(msgspec.Struct, frozen=True):
    """QEMU understood the command `command_id` and refused it."""

    command_id: int | None
    error_class: str
    description: str


Message = Greeting | Event | Reply | Refusal


class _Triple(msgspec.Struct):
    major: int
    minor: int
    micro: int


class _Version(msgspec.Struct):
    qemu: _Triple


class _Qmp(msgspec.Struct):
    version: _Version


class _Error(msgspec.Struct):
    error_class: str = msgspec.field(name="class", default="GenericError")
    description: str = msgspec.field(name="desc", default="")


class _Timestamp(msgspec.Struct):
    seconds: int = 0
    microseconds: int = 0


class _Line(msgspec.Struct):
    qmp: _Qmp | msgspec.UnsetType = msgspec.field(name="QMP", default=msgspec.UNSET)
    event: str | msgspec.UnsetType = msgspec.UNSET
    data: dict[str, Any] = msgspec.field(default_factory=dict)
    value: Any = msgspec.field(name="return", default=msgspec.UNSET)
    error: _Error | msgspec.UnsetType = msgspec.UNSET
    id: int | None = None
    timestamp: _Timestamp = msgspec.field(default_factory=_Timestamp)


_DECODER = msgspec.json.Decoder(_Line)


def encode_command(
    name: str, arguments: dict[str, Any] | None = None, *, command_id: int, is_urgent: bool = False
) -> bytes:
    """Return the line that asks QEMU to execute `name`; at once, where it `is_urgent`: "out of band"."""
    message: dict[str, Any] = {"exec-oob" if is_urgent else "execute": name, "id": command_id}
    if arguments:
        message["arguments"] = arguments
    return msgspec.json.encode(message) + b"\n"


def decode_line(line: bytes) -> Message:
    """Return the message in `line`.

    :raises QmpGarbage: it is not one.
    """
    try:
        parsed = _DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise QmpGarbage from error
    if parsed.event is not msgspec.UNSET:
        at = parsed.timestamp.seconds * 1_000_000 + parsed.timestamp.microseconds
        return Event(parsed.event, parsed.data, at)
    if parsed.error is not msgspec.UNSET:
        return Refusal(parsed.id, parsed.error.error_class, parsed.error.description)
    if parsed.value is not msgspec.UNSET:
        return Reply(parsed.id, parsed.value)
    if isinstance(parsed.qmp, _Qmp):
        triple = parsed.qmp.version.qemu
        return Greeting((triple.major, triple.minor, triple.micro))
    raise QmpGarbage


class MessageBuffer:
    """Collects bytes as they come and gives whole messages. Looks at each byte once."""

    __slots__ = ("_parts", "_size", "_whole")

    def __init__(self) -> None:
        self._whole: list[bytes] = []  # lines not decoded yet, last first
        self._parts: list[bytes] = []  # the line under way
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Add what was received.

        :raises QmpGarbage: a line is longer than any that QEMU sends.
        """
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = b"".join((*self._parts, lines[0]))
            self._parts, self._size = [], 0
            self._whole[:0] = reversed([line for line in lines if line.strip()])
        if rest:
            self._parts.append(rest)
            self._size += len(rest)
        if self._size > MAX_LINE_BYTES:
            raise QmpGarbage

    def take(self) -> Message | None:
        """Return the next whole message, or None.

        :raises QmpGarbage: the next line is not a message.
        """
        return decode_line(self._whole.pop()) if self._whole else None

    def __iter__(self) -> Iterator[Message]:
        while (message := self.take()) is not None:
            yield message
