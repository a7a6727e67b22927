"""Events in a file, so that their numbers go on when the next VMM does.

One JSON line each, behind a line that says when the clock of them began. The file is begun anew, with the
newest half of its events, where it is found to be longer than `MOST_BYTES`.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

import msgspec

from cloudvmm.config import form
from cloudvmm.events.hub import Event

MOST_BYTES: Final = 4 * 1024 * 1024


class _Kept(msgspec.Struct):
    """An event, as it is written."""

    number: int
    monotonic_ns: int
    source: str
    event: str
    properties: dict[str, str] | None = None
    is_ours: bool = False


class _Start(msgspec.Struct, forbid_unknown_fields=True):
    start_ns: int


class EventLog:
    """`events` are those that were in the file, oldest first, and `start_ns` is when their clock began.

    A fault of the file costs what would be written, and nothing else.
    """

    def __init__(self, path: str, *, start_ns: int) -> None:
        self.events: list[Event] = []
        self.start_ns = start_ns
        self._path = path
        self._size = 0
        self._fd = -1
        with contextlib.suppress(OSError):
            self._read()
        with contextlib.suppress(OSError):
            self._begin(self.events)

    def append(self, event: Event) -> None:
        """Write `event`. One thread at a time."""
        line = _line(event)
        with contextlib.suppress(OSError):
            if self._size + len(line) > MOST_BYTES:
                self.events.clear()
                self._read()
                self._begin(self.events[len(self.events) // 2 :])
                self.events.clear()
            if self._fd >= 0:
                self._size += os.write(self._fd, line)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> None:
        with open(self._path, "rb") as file:
            with contextlib.suppress(msgspec.DecodeError):
                self.start_ns = form.decoder(_Start).decode(file.readline()).start_ns
            for line in file:
                with contextlib.suppress(msgspec.DecodeError):  # the last line of a VMM that was killed
                    kept = form.decoder(_Kept).decode(line)
                    self.events.append(Event(**msgspec.structs.asdict(kept)))

    def _begin(self, events: list[Event]) -> None:
        """Begin the file anew with `events`."""
        self.close()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(f"{self._path}.new", flags, 0o600)
        try:
            lines = [msgspec.json.encode(_Start(self.start_ns)) + b"\n", *map(_line, events)]
            self._size = os.write(fd, b"".join(lines))
            os.rename(f"{self._path}.new", self._path)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd


def _line(event: Event) -> bytes:
    return msgspec.json.encode({name: getattr(event, name) for name in event.__slots__}) + b"\n"
