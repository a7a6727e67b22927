"""What went over a server's connections, one file each, and whether the API's document has it.

Light on imports for the server's process, which writes the files; the document is read only to check.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

RECEIVED, SENT = b"<", b">"

_STREAM = b"Content-Type: text/event-stream"
_HEAD = struct.Struct("<cI")


def note(path: str, direction: bytes, raw: bytes) -> None:
    """Add `raw` to the file of a connection."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, _HEAD.pack(direction, len(raw)) + raw)
    finally:
        os.close(fd)


def check_all(folder: Path) -> int:
    """Return how many answers were looked at.

    :raises AssertionError: a connection has an exchange that the API's document does not.
    """
    return sum(_check(path) for path in sorted(folder.iterdir()))


def _check(path: Path) -> int:
    from support.traffic import Traffic

    traffic = Traffic()
    count = 0
    for direction, raw in _notes(path.read_bytes()):
        if direction == RECEIVED:
            traffic.sent(raw)
            continue
        # The server sends each answer in one go.
        head, _, body = raw.partition(b"\r\n\r\n")
        if _STREAM in head:
            break
        traffic.answered(head, body)
        count += 1
    return count


def _notes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Give each note; the last one of a server that was killed may be cut."""
    place = 0
    while place + _HEAD.size <= len(content):
        direction, length = _HEAD.unpack_from(content, place)
        place += _HEAD.size
        yield direction, content[place : place + length]
        place += length
