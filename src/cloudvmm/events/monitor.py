"""Events in the reference's own words: the event monitor's file, and the log.

The forms are Cloud Hypervisor's, byte for byte (reference: lifecycle.md section 11).
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from cloudvmm.events.hub import Event

NANOSECONDS = 1_000_000_000


def event_document(event: Event) -> dict[str, Any]:
    """Return the members that an event has wherever it is shown."""
    secs, nanos = divmod(event.monotonic_ns, NANOSECONDS)
    return {
        "timestamp": {"secs": secs, "nanos": nanos},
        "source": event.source,
        "event": event.event,
        "properties": event.properties,
    }


def render_event(event: Event) -> bytes:
    """Return `event` as the monitor file has it, two newlines included."""
    return msgspec.json.format(msgspec.json.encode(event_document(event)), indent=2) + b"\n\n"


def log_text(event: Event) -> str:
    """Return what the log says about `event`; the space before the properties is there without any too."""
    properties = ", ".join(f"{key} = {value}" for key, value in (event.properties or {}).items())
    return f"Event: source = {event.source} event = {event.event} {properties}"


class EventMonitor:
    """Writes events to a descriptor that it owns and has made non-blocking; write errors are ignored.

    A reader that does not keep up loses whole events, never a part of one: what a full pipe took of an event
    is completed before anything else, and what comes meanwhile is not written.
    """

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._left = b""

    @classmethod
    def at_path(cls, path: str) -> EventMonitor:
        """Create or truncate the file at `path`.

        :raises OSError: it cannot be opened for writing.
        """
        return cls(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))

    def __call__(self, event: Event) -> None:
        if event.is_ours:
            return
        if self._left:
            self._left = self._write(self._left)
        if not self._left:
            text = render_event(event)
            left = self._write(text)
            self._left = b"" if len(left) == len(text) else left

    def close(self) -> None:
        """Complete an event that was written in part, if there is room, and close."""
        if self._fd >= 0:
            self._write(self._left)
            os.close(self._fd)
            self._fd = -1

    def _write(self, text: bytes) -> bytes:
        """Write without waiting; return what was not taken."""
        try:
            return text[os.write(self._fd, text) :] if text else b""
        except OSError:
            return text
