"""The console sinks that control would hand to an engine for a configured mode."""

from __future__ import annotations

from cloudvmm.config.console import ConsoleOutputMode
from cloudvmm.engine.base import ConsoleSink, SinkKind


def sink_of(mode: ConsoleOutputMode, path: str | None, fd: int) -> ConsoleSink:
    match mode:
        case ConsoleOutputMode.OFF:
            return ConsoleSink(kind=SinkKind.OFF)
        case ConsoleOutputMode.NULL:
            return ConsoleSink(kind=SinkKind.NULL)
        case ConsoleOutputMode.FILE:
            return ConsoleSink(kind=SinkKind.FILE, path=path)
        case _:
            return ConsoleSink(kind=SinkKind.STREAM, stream_fd=fd)
