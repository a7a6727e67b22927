"""`--serial`, `--console` and `--debug-console`."""

from __future__ import annotations

import re

from cloudvmm.config.console import (
    ConsoleConfig,
    ConsoleFileMissing,
    ConsoleOutputMode,
    ConsoleSocketPathMissing,
    DebugConsoleConfig,
    InvalidIoPortHex,
    SerialConfig,
)
from cloudvmm.options.error import InvalidConsoleMode, ValidationFailed
from cloudvmm.options.grammar import Options
from cloudvmm.options.schema import PCI_KEYS_IOMMU, Key, Schema
from cloudvmm.options.value import PATH, TEXT

# In order of precedence where several are given; `file` and `socket` come after.
_FLAGS = {
    "off": ConsoleOutputMode.OFF,
    "pty": ConsoleOutputMode.PTY,
    "tty": ConsoleOutputMode.TTY,
    "null": ConsoleOutputMode.NULL,
}
_FILE = Key("file", PATH)
_SOCKET = Key("socket", PATH)
_IO_PORT = re.compile(r"0x([0-9a-fA-F]+)")

SERIAL = Schema("--serial", _FILE, _SOCKET, flags=tuple(_FLAGS))
CONSOLE = Schema("--console", _FILE, _SOCKET, *PCI_KEYS_IOMMU, flags=tuple(_FLAGS))
DEBUG_CONSOLE = Schema("--debug-console", _FILE, Key("iobase", TEXT), flags=tuple(_FLAGS))


def parse_serial(text: str) -> SerialConfig:
    """:raises OptionError: when `text` is not what `--serial` takes."""
    options = SERIAL.parse(text)
    mode = _mode(options)
    return SerialConfig(mode=mode, file=_file(options, mode), socket=_socket(options, mode))


def parse_console(text: str) -> ConsoleConfig:
    """:raises OptionError: when `text` is not what `--console` takes."""
    options = CONSOLE.parse(text)
    mode = _mode(options)
    file, socket = _file(options, mode), _socket(options, mode)
    members = CONSOLE.convert(options)
    return ConsoleConfig(**{**members, "mode": mode, "file": file, "socket": socket})


def parse_debug_console(text: str) -> DebugConsoleConfig:
    """:raises OptionError: when `text` is not what `--debug-console` takes."""
    options = DEBUG_CONSOLE.parse(text)
    mode = _mode(options)
    return DebugConsoleConfig(mode=mode, file=_file(options, mode), iobase=_io_port(options.get("iobase")))


def _mode(options: Options) -> ConsoleOutputMode:
    for flag, mode in _FLAGS.items():
        if options.is_set(flag):
            return mode
    if options.is_set("file"):
        return ConsoleOutputMode.FILE
    if options.is_set("socket"):
        return ConsoleOutputMode.SOCKET
    raise InvalidConsoleMode


def _file(options: Options, mode: ConsoleOutputMode) -> str | None:
    if mode is not ConsoleOutputMode.FILE:
        return None
    file = options.get("file")
    if file is None:
        raise ValidationFailed from ConsoleFileMissing()
    return file


def _socket(options: Options, mode: ConsoleOutputMode) -> str | None:
    if mode is not ConsoleOutputMode.SOCKET:
        return None
    socket = options.get("socket")
    if socket is None:
        raise ValidationFailed from ConsoleSocketPathMissing()
    return socket


def _io_port(text: str | None) -> int | None:
    if text is None:
        return None
    match = _IO_PORT.fullmatch(text)
    port = int(match[1], 16) if match else -1
    if not 0 <= port <= 0xFFFF:
        raise ValidationFailed from InvalidIoPortHex(text)
    return port
