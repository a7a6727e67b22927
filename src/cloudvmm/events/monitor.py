"""The event monitor file: one pretty-printed JSON object and an empty line per event.

Its form is Cloud Hypervisor's, byte for byte (reference: lifecycle.md section 11).
"""

from __future__ import annotations

import contextlib
import os

import msgspec

from cloudvmm.events.hub import Event

NANOSECONDS = 1_000_000_000


def render_event(event: Event) -> bytes:
    """Return `event` as the monitor file has it, two newlines included."""
    secs, nanos = divmod(event.monotonic_ns, NANOSECONDS)
    document = {
        "timestamp": {"secs": secs, "nanos": nanos},
        "source": event.source,
        "event": event.event,
        "properties": event.properties,
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n\n"


class EventMonitor:
    """Writes events to a descriptor that it owns and has made non-blocking; write errors are ignored."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd

    @classmethod
    def at_path(cls, path: str) -> EventMonitor:
        """Create or truncate the file at `path`.

        :raises OSError: it cannot be opened for writing.
        """
        return cls(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))

    def __call__(self, event: Event) -> None:
        with contextlib.suppress(OSError):
            os.write(self._fd, render_event(event))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
