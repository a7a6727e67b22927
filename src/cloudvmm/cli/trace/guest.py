"""How far a guest is on its way, read off the file that its serial port writes to.

The kernel stamps its lines with its own clock, and the default guest says how old it is when it is ready.
What arrives with a stamp tells when that clock began: at the arrival less the stamp, or before. The firmware
had the time until then, and the kernel's first steps are in that. The line that names the init ends the
kernel's part. With `quiet` in the guest's command line there is none, and kernel and init are one piece.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import time
from typing import Final

from cloudvmm.cli.trace.file import GUEST_ROW, TraceFile

_POLL_EVERY_S: Final = 0.001
_GIVE_UP_S: Final = 600.0
_READ_BYTES: Final = 65536
_STAMPED: Final = re.compile(rb"^\[ *(\d+\.\d+)\] (.*)")
_READY: Final = re.compile(rb"cloudvmm-guest ready uptime=(\d+\.\d+)")
_INIT: Final = re.compile(rb"Run \S+ as init process")
_NS: Final = 1_000_000_000


class GuestMarks:
    """When what began, in nanoseconds of the monotonic clock; filled line by line."""

    def __init__(self, run_ns: int) -> None:
        self.run_ns = run_ns
        self.kernel_ns: int | None = None
        self.init_ns: int | None = None
        self.ready_ns: int | None = None
        self._init_stamp_ns: int | None = None

    def take(self, line: bytes, now_ns: int) -> None:
        """Learn from a whole line that arrived at `now_ns`."""
        if stamped := _STAMPED.match(line):
            stamp_ns = int(float(stamped[1]) * _NS)
            self._note_kernel(now_ns - stamp_ns)
            if _INIT.search(stamped[2]):
                self._init_stamp_ns = stamp_ns
        elif ready := _READY.search(line):
            if self.kernel_ns is None:
                self._note_kernel(now_ns - int(float(ready[1]) * _NS))
            self.ready_ns = now_ns
        if self._init_stamp_ns is not None and self.kernel_ns is not None:
            self.init_ns = self.kernel_ns + self._init_stamp_ns

    def spans(self) -> list[tuple[str, int, int]]:
        """Return name, begin and end of what is over: pieces without a gap, then the whole if it is ready."""
        kernel = "kernel" if self.init_ns is not None else "kernel and init"
        borders = [
            ("firmware", self.run_ns),
            (kernel, self.kernel_ns),
            ("init", self.init_ns),
            ("", self.ready_ns),
        ]
        known = [(name, begun_ns) for name, begun_ns in borders if begun_ns is not None]
        pieces = [(name, begun_ns, ended_ns) for (name, begun_ns), (_, ended_ns) in itertools.pairwise(known)]
        if self.ready_ns is None:
            return pieces
        return [("guest boots", self.run_ns, self.ready_ns), *pieces]

    def _note_kernel(self, began_ns: int) -> None:
        """Arrivals are late, never early: the earliest is the nearest. No guest begins before it runs."""
        began_ns = max(began_ns, self.run_ns)
        self.kernel_ns = began_ns if self.kernel_ns is None else min(self.kernel_ns, began_ns)


class GuestWatch:
    """Follows the file at `path` from where it ends now, in a thread of its own, until the guest is ready."""

    def __init__(self, trace: TraceFile, path: str) -> None:
        self._trace = trace
        self._ending = threading.Event()
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError):
            self._fd = -1
            return
        with contextlib.suppress(OSError):  # no plain file: there is nothing before
            os.lseek(self._fd, 0, os.SEEK_END)

    def start(self) -> None:
        """The guest runs from now on."""
        self._marks = GuestMarks(time.monotonic_ns())
        if self._fd < 0:
            return
        self._thread = threading.Thread(target=self._run, name="guest-trace", daemon=True)
        self._thread.start()
        self._trace.on_close(self._end)

    def _end(self) -> None:
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        deadline_s = time.monotonic() + _GIVE_UP_S
        rest = b""
        try:
            while self._marks.ready_ns is None and time.monotonic() < deadline_s:
                piece = b""
                with contextlib.suppress(BlockingIOError):
                    piece = os.read(self._fd, _READ_BYTES)
                now_ns = time.monotonic_ns()
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._marks.take(line, now_ns)
                if not piece and self._ending.wait(_POLL_EVERY_S):
                    break
        except OSError:
            pass  # what is known so far is told
        finally:
            os.close(self._fd)
        for name, begun_ns, ended_ns in self._marks.spans():
            self._trace.span(name, begun_ns, ended_ns, row=GUEST_ROW)
