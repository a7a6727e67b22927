"""The trace of one process: its start in pieces, then what the table names, until its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from cloudvmm.cli.trace.file import TraceFile
from cloudvmm.cli.trace.table import install

T = TypeVar("T")


class StartTrace:
    """`begun_ns` is when our own code began, `parsed_ns` when it knew its flags. The interpreter came before.

    :raises TraceFileCreation: the file cannot be opened.
    """

    def __init__(self, path: str, begun_ns: int, parsed_ns: int) -> None:
        self._file = TraceFile(path)
        self._exec_ns = min(process_began_ns(), begun_ns)
        self._at_ns = parsed_ns
        self._file.span("interpreter", self._exec_ns, begun_ns)
        self._file.span("flags", begun_ns, parsed_ns)

    def is_loaded(self) -> None:
        """What serves is imported; nothing is started yet."""
        self._note("imports")
        install(self._file)

    def is_ready(self) -> None:
        """The API is there."""
        self._note("threads and socket")
        self._file.span("start", self._exec_ns, self._at_ns)

    def loading(self, load: Callable[[], T]) -> Callable[[], T]:
        """Return `load` with a span of its own, and with what it loads in the trace."""

        def loading() -> T:
            with self._file.spanning("load the engine"):
                loaded = load()
            install(self._file)
            return loaded

        return loading

    def close(self) -> None:
        self._file.close()

    def _note(self, name: str) -> None:
        """Add what has been done since the last time."""
        now_ns = time.monotonic_ns()
        self._file.span(name, self._at_ns, now_ns)
        self._at_ns = now_ns


def process_began_ns() -> int:
    """Return when this process began, in nanoseconds of the monotonic clock; exact to a tick (10 ms)."""
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    since_boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    began_ns = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - (since_boot_ns - began_ns)
