"""The bytes of server-sent events into frames. No I/O.

The grammar is the WHATWG's: lines end with LF, CR or CRLF, a line that begins with a colon is skipped, an
empty line ends a frame, a frame without data is none, but its id counts.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.client.error import BadReply

FRAME_LIMIT_BYTES: Final = 1 << 20


class Frame:
    """`name` is "message" where the server gives none."""

    __slots__ = ("data", "name")

    def __init__(self, name: str, data: str) -> None:
        self.name = name
        self.data = data


class FrameParser:
    """The state of one stream. `last_id` is the id of the newest frame that had one."""

    def __init__(self) -> None:
        self.last_id = ""
        self._left = b""
        self._name = ""
        self._id = ""
        self._data: list[str] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[Frame]:
        """Take the next bytes; return the frames that they complete.

        :raises BadReply: a frame is longer than any event can be.
        """
        frames: list[Frame] = []
        text = self._left + piece
        # A CR at the end may be half of a CRLF.
        held = b"\r" if text.endswith(b"\r") else b""
        lines = text.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._left = lines.pop() + held
        for line in lines:
            if line:
                self._take_field(line.decode(errors="replace"))
            else:
                self._end_frame(frames)
        if len(self._left) + self._size > FRAME_LIMIT_BYTES:
            raise BadReply(f"An event is longer than {FRAME_LIMIT_BYTES} bytes")
        return frames

    def _take_field(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        self._size += len(line) + 1
        if field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
        elif field == "id":
            self._id = value

    def _end_frame(self, frames: list[Frame]) -> None:
        self.last_id = self._id
        if self._data:
            frames.append(Frame(self._name or "message", "\n".join(self._data)))
        self._name, self._data, self._size = "", [], 0
