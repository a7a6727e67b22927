"""The log, in the reference's formats, without the weight of `logging`.

A record is one line, written at once, from any thread. What is worth a record is the caller's
business; where it goes and how it looks is this file's.
"""

from __future__ import annotations

import enum
import os
import select
import sys
import threading
import time

from cloudvmm import cli
from cloudvmm.value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    Renderer = Callable[["Record"], str]

DEFAULT_FORMAT = "cloud-hypervisor: {boottime}s: <{thread}> {level}:{location} -- {msg}"


class Level(enum.IntEnum):
    ERROR = 0
    WARN = 1
    INFO = 2
    DEBUG = 3
    TRACE = 4


_BY_NAME = {level.name.lower(): level for level in Level}


class Record(Value):
    """`time_ns` is nanoseconds since the epoch, `elapsed_s` seconds since the process began to log."""

    __slots__ = ("level", "text", "thread", "location", "time_ns", "elapsed_s")  # noqa: RUF023

    def __init__(
        self, *, level: Level, text: str, thread: str, location: str, time_ns: int, elapsed_s: float
    ) -> None:
        self.level = level
        self.text = text
        self.thread = thread
        self.location = location
        self.time_ns = time_ns
        self.elapsed_s = elapsed_s

    def instead(self, text: str, *, level: Level) -> Record:
        """Return another one of the same moment and place."""
        return Record(
            level=level,
            text=text,
            thread=self.thread,
            location=self.location,
            time_ns=self.time_ns,
            elapsed_s=self.elapsed_s,
        )


class Logger:
    """Writes records up to `level` to `sink`, which must be unbuffered and is closed by `close`.

    :raises LoggerFormat: when `log_format` does not parse.
    """

    def __init__(self, level: Level, sink: BinaryIO, log_format: str = DEFAULT_FORMAT) -> None:
        try:
            self._renderers = compile_format(log_format)
        except cli.error.FormatError as error:
            raise cli.error.LoggerFormat(log_format, _token_names()) from error
        self._level = level
        self._sink = sink
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._lost = 0
        self._poller = _poller_of(sink)

    def error(self, text: str, *, thread: str | None = None, location: str = "cloudvmm") -> None:
        self.write(Level.ERROR, text, thread=thread, location=location)

    def warn(self, text: str, *, thread: str | None = None, location: str = "cloudvmm") -> None:
        self.write(Level.WARN, text, thread=thread, location=location)

    def info(self, text: str, *, thread: str | None = None, location: str = "cloudvmm") -> None:
        self.write(Level.INFO, text, thread=thread, location=location)

    def debug(self, text: str, *, thread: str | None = None, location: str = "cloudvmm") -> None:
        self.write(Level.DEBUG, text, thread=thread, location=location)

    def trace(self, text: str, *, thread: str | None = None, location: str = "cloudvmm") -> None:
        self.write(Level.TRACE, text, thread=thread, location=location)

    def log(self, level: str, text: str | Callable[[], str]) -> None:
        """Write at the level named `error`, `warn`, `info`, `debug` or `trace`.

        `text` may be a function that makes it: it is not called for a record that is not written.
        """
        wanted = _BY_NAME[level]
        if wanted <= self._level:
            self.write(wanted, text if isinstance(text, str) else text())

    def write(
        self, level: Level, text: str, *, thread: str | None = None, location: str = "cloudvmm"
    ) -> None:
        """Write a record unless the level is too fine; `thread` is the current one's name if unset.

        A sink that fails or has no room loses the record: the log must not stop a VM.
        """
        if level > self._level:
            return
        record = Record(
            level=level,
            text=text,
            thread=thread or _thread_name(),
            location=location,
            time_ns=time.time_ns(),
            elapsed_s=time.monotonic() - self._start,
        )
        with self._lock:
            if self._lost:
                missing = f"{self._lost} records were lost: the log could not be written"
                if not self._put(record.instead(missing, level=Level.WARN)):
                    self._lost += 1
                    return
                self._lost = 0
            if not self._put(record):
                self._lost += 1

    def _put(self, record: Record) -> bool:
        """Write `record` without waiting; say whether it went out."""
        line = "".join([render(record) for render in self._renderers]) + "\r\n"
        rest = memoryview(line.encode(errors="replace"))
        try:
            while rest:
                if self._poller is not None and not self._poller.poll(0):
                    return False
                # What polls as writable takes this much at once, be it a pipe or a terminal.
                rest = rest[self._sink.write(rest[: select.PIPE_BUF]) or 0 :]
        except (OSError, ValueError):
            return False
        return True

    def close(self) -> None:
        """Close the sink; later records are lost. Standard error itself stays open."""
        self._sink.close()


def _poller_of(sink: BinaryIO) -> select.poll | None:
    """Return what tells whether `sink` takes more; None where it is no file of the operating system."""
    poller = select.poll()
    try:
        poller.register(sink, select.POLLOUT)
    except (OSError, ValueError):
        return None
    return poller


def open_log(*, verbosity: int, log_file: str | None, log_format: str = DEFAULT_FORMAT) -> Logger:
    """Make the log that `-v`, `--log-file` (truncated) and `--log-format` ask for.

    :raises LogFileCreation: when the file cannot be opened.
    :raises LoggerFormat: when the format does not parse.
    """
    level = Level(min(Level.WARN + verbosity, Level.TRACE))
    try:
        path: str | int = log_file if log_file is not None else sys.stderr.fileno()
        sink = open(path, "wb", buffering=0, closefd=log_file is not None)  # noqa: SIM115
    except OSError as error:
        raise cli.error.LogFileCreation from error
    return Logger(level, sink, log_format)


def compile_format(log_format: str) -> list[Renderer]:
    """Split a format into what renders its parts; braces meant literally are doubled.

    :raises FormatError: when a brace is alone or a token unknown.
    """
    renderers: list[Renderer] = []
    rest = log_format
    literal = ""
    while rest:
        letter, rest = rest[0], rest[1:]
        if letter in "{}" and rest[:1] == letter:
            literal, rest = literal + letter, rest[1:]
        elif letter == "{":
            name, brace, rest = rest.partition("}")
            if not brace:
                raise cli.error.UnterminatedBrace
            renderers += [_literal(literal), _token(name)]
            literal = ""
        elif letter == "}":
            raise cli.error.UnmatchedBrace
        else:
            literal += letter
    return [*renderers, _literal(literal)]


def _literal(text: str) -> Renderer:
    return lambda record: text


def _token(name: str) -> Renderer:
    if name in _TOKENS:
        return _TOKENS[name]
    field = name.removeprefix("local")
    if field in _TIME_FIELDS:
        pattern = _TIME_FIELDS[field]
        return _moment(pattern, is_local=field != name)
    raise cli.error.UnknownToken(name)


def _token_names() -> str:
    names = [*_TOKENS, *_TIME_FIELDS, *(f"local{field}" for field in _TIME_FIELDS)]
    return " ".join(f"{{{name}}}" for name in names)


def _moment(pattern: str, *, is_local: bool) -> Renderer:
    """Render a moment by strftime's letters, of which `%f` is microseconds and `%z` `+hh:mm`."""

    def render(record: Record) -> str:
        seconds, nanoseconds = divmod(record.time_ns, 10**9)
        moment = time.localtime(seconds) if is_local else time.gmtime(seconds)
        sign, offset = ("-", -moment.tm_gmtoff) if moment.tm_gmtoff < 0 else ("+", moment.tm_gmtoff)
        zone = f"{sign}{offset // 3600:02}:{offset // 60 % 60:02}"
        micros = f"{nanoseconds // 1000:06}"
        return time.strftime(pattern.replace("%f", micros).replace("%z", zone), moment)

    return render


def _thread_name() -> str:
    thread = threading.current_thread()
    return "main" if thread is threading.main_thread() else thread.name or "anonymous"


_GLOG = "%m%d %H:%M:%S.%f"
_TIME_FIELDS = {
    "year": "%Y",
    "month": "%m",
    "day": "%d",
    "hour": "%H",
    "minute": "%M",
    "second": "%S",
    "micros": "%f",
    "offset": "%z",
}
_TOKENS: dict[str, Renderer] = {
    "boottime": lambda record: f"{record.elapsed_s:>10.6f}",
    "wallclock": _moment("%Y-%m-%dT%H:%M:%S.%fZ", is_local=False),
    "glog": _moment(_GLOG, is_local=False),
    "localglog": _moment(_GLOG, is_local=True),
    "thread": lambda record: record.thread,
    "level": lambda record: record.level.name,
    "levelchar": lambda record: record.level.name[0],
    "location": lambda record: record.location,
    "msg": lambda record: record.text,
    "pid": lambda record: str(os.getpid()),
    "tid": lambda record: str(threading.get_native_id()),
}
