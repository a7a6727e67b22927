"""A file of spans in Chrome's trace format, which Perfetto and Chrome open.

Each event is one line, written when it is over; the list is closed at the end. The format lets the closing
bracket be missing, so that what a killed process leaves can be opened as well. Times are microseconds of the
monotonic clock. Rows are threads, by their names; a row that is no thread has a number of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from cloudvmm.cli.error import TraceFileCreation

GUEST_ROW: Final = 1  # no thread: init has this number
_encode = msgspec.json.Encoder().encode


class TraceFile:
    """Any thread may add to it. What comes after `close`, or cannot be written, is lost.

    :raises TraceFileCreation: the file at `path`, which is begun anew, cannot be opened.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o600)
        except (OSError, ValueError) as error:
            raise TraceFileCreation from error
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._rows: set[int] = set()
        self._on_close: list[Callable[[], None]] = []
        self._write(b"[\n")
        self._put({"ph": "M", "name": "process_name", "args": {"name": "cloudvmm"}}, row=self._pid)
        self.name_row(GUEST_ROW, "guest")

    def span(
        self,
        name: str,
        begun_ns: int,
        ended_ns: int,
        *,
        row: int | None = None,
        error: str | None = None,
    ) -> None:
        """Add what took from `begun_ns` to `ended_ns` of the monotonic clock, on this thread or on `row`.

        `error` is what it failed with.
        """
        if row is None:
            row = threading.get_native_id()
            self.name_row(row, threading.current_thread().name)
        event = {"ph": "X", "name": name, "ts": begun_ns / 1000, "dur": (ended_ns - begun_ns) / 1000}
        self._put({**event, "args": {} if error is None else {"error": error}}, row=row)

    @contextlib.contextmanager
    def spanning(self, name: str) -> Iterator[None]:
        """Add what is done within as a span of this thread."""
        begun_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self.span(name, begun_ns, time.monotonic_ns())

    def name_row(self, row: int, name: str) -> None:
        if row not in self._rows:
            self._rows.add(row)
            self._put({"ph": "M", "name": "thread_name", "args": {"name": name}}, row=row)

    def on_close(self, call: Callable[[], None]) -> None:
        """Have `call` add the last it knows before the file is closed."""
        self._on_close.append(call)

    def close(self) -> None:
        for call in self._on_close:
            call()
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            end = _encode({"ph": "M", "name": "process_labels", "pid": self._pid, "args": {"labels": ""}})
            _write_all(fd, end + b"\n]\n")
            os.close(fd)

    def _put(self, event: dict[str, Any], *, row: int) -> None:
        self._write(_encode({**event, "pid": self._pid, "tid": row}) + b",\n")

    def _write(self, line: bytes) -> None:
        with self._lock:
            if self._fd >= 0:
                _write_all(self._fd, line)


def _write_all(fd: int, line: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk costs the trace, not the VM
        while line:
            line = line[os.write(fd, line) :]
