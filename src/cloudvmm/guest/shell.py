"""The host's end of the guest's shell service: run a script in the guest, get status and output.

The service speaks lines (its own file, `rootfs/usr/lib/cloudvmm/service`, says which). Everything
on the stream that lacks its marker is the console's and is passed on, never an error. One caller at
a time: the object is not thread-safe, and the guest runs one script after the other.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import select
import time
from collections.abc import Callable
from typing import Protocol

from cloudvmm.guest.error import GuestProtocolError, GuestShellClosed, GuestShellTimeout

_MARKER = b"@cvm "
_READY = re.compile(rb"cloudvmm-guest ready uptime=([0-9.]+)")
_PING_EVERY_S = 1.0
_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 16  # far beyond any of the service's


class _HasFd(Protocol):
    def fileno(self) -> int: ...


class GuestShell:
    """Talks over `stream`: a connected socket, a PTY or anything with a descriptor, or the descriptor.

    The stream stays the caller's to close and must outlive this object; it is switched to
    non-blocking. `on_line` is handed each line that is not the service's, without its end; one
    of more than 64 KiB comes in pieces.
    """

    def __init__(self, stream: int | _HasFd, *, on_line: Callable[[bytes], None] | None = None) -> None:
        self._fd = stream if isinstance(stream, int) else stream.fileno()
        os.set_blocking(self._fd, False)
        self._on_line = on_line
        self._buffer = b""
        self._last_id = 0

    def wait_ready(self, timeout_s: float) -> None:
        """Return when the service answers. Blocks, `timeout_s` seconds at most.

        The service announces itself when it starts; one that started before we listened is asked.

        :raises GuestShellTimeout: when it did not answer in time.
        :raises GuestShellClosed: when the stream ended.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fields = self._read_answer(min(deadline, time.monotonic() + _PING_EVERY_S))
            except GuestShellTimeout:
                if time.monotonic() >= deadline:
                    raise
                self._send(b"ping ready\n", deadline)
                continue
            if fields[0] in (b"ready", b"pong"):
                return

    def run(self, script: str, *, timeout_s: float) -> tuple[int, bytes]:
        """Run the sh `script` in the guest; return its exit status and all it printed (1 and 2).

        Blocks, `timeout_s` seconds at most. The guest goes on with a script that took too long, and
        runs the next one after it.

        :raises GuestShellTimeout: when the answer was not complete in time.
        :raises GuestShellClosed: when the stream ended; the script may have run.
        :raises GuestProtocolError: when the answer lacks a part or is garbled; the script has run.
        """
        deadline = time.monotonic() + timeout_s
        self._last_id += 1
        script_id = b"%d" % self._last_id
        request = b"run %s %s\n" % (script_id, base64.b64encode(script.encode()))
        self._send(request, deadline)
        chunks: list[bytes] = []
        while True:
            fields = self._read_answer(deadline)
            if len(fields) < 2 or fields[1] != script_id:
                continue  # a pong, or what an earlier, given up script still says
            match fields:
                case [b"out", _, number, length, data]:
                    chunks.append(_chunk(number, length, data, expected=len(chunks) + 1))
                case [b"out", *_]:
                    raise GuestProtocolError
                case [b"end", _, status, count]:
                    return _end(status, count, chunks)
                case _:  # begin
                    continue

    def _read_answer(self, deadline: float) -> list[bytes]:
        """Return the fields of the service's next line; hand all other lines on."""
        while True:
            line = self._read_line(deadline)
            _, marker, answer = line.partition(_MARKER)
            if marker and (fields := answer.split()):
                return fields
            if self._on_line is not None:
                self._on_line(line)

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            if len(self._buffer) >= _MAX_LINE_BYTES:
                line, self._buffer = self._buffer[:_MAX_LINE_BYTES], self._buffer[_MAX_LINE_BYTES:]
                return line
            self._wait(select.POLLIN, deadline)
            try:
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as error:  # EIO: the other end of a PTY is closed
                raise GuestShellClosed from error
            if not data:
                raise GuestShellClosed
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def _send(self, request: bytes, deadline: float) -> None:
        rest = memoryview(request)
        while rest:
            self._wait(select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise GuestShellClosed from error

    def _wait(self, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._fd, event)
        remaining_s = deadline - time.monotonic()
        # A guest that never stops talking is always ready: that alone must not keep us.
        if remaining_s < 0 or not poll.poll(remaining_s * 1000):
            raise GuestShellTimeout


def ready_uptime_s(console: bytes) -> float | None:
    """Return the guest's uptime in seconds from its ready line in `console`; None if it is not there."""
    found = _READY.search(console)
    return float(found[1]) if found else None


def _chunk(number: bytes, length: bytes, data: bytes, *, expected: int) -> bytes:
    try:
        if int(number) != expected or int(length) != len(data):
            raise GuestProtocolError
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise GuestProtocolError from error


def _end(status: bytes, count: bytes, chunks: list[bytes]) -> tuple[int, bytes]:
    try:
        if int(count) != len(chunks):
            raise GuestProtocolError
        return int(status), b"".join(chunks)
    except ValueError as error:
        raise GuestProtocolError from error
