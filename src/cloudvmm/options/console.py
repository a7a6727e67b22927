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
from cloudvmm.options.grammar import Options, dequote
from cloudvmm.options.schema import PCI_KEYS_IOMMU, Key, Schema
from cloudvmm.options.value import PATH, ValueType

# In order of precedence where several are given; `file` and `socket` come after.
_FLAGS = {
    "off": ConsoleOutputMode.OFF,
    "pty": ConsoleOutputMode.PTY,
    "tty": ConsoleOutputMode.TTY,
    "null": ConsoleOutputMode.NULL,
}
_WORDS = {mode: flag for flag, mode in _FLAGS.items()}
_IO_PORT = re.compile(r"0x([0-9a-fA-F]+)")
_IO_PORT_SYNTAX = "0x<port>"


def _parse_io_port(text: str) -> int:
    digits = dequote(text)
    match = _IO_PORT.fullmatch(digits)
    port = int(match[1], 16) if match else -1
    if not 0 <= port <= 0xFFFF:
        raise ValidationFailed(hint=f"--debug-console iobase={_IO_PORT_SYNTAX}") from InvalidIoPortHex(digits)
    return port


_FILE = Key("file", PATH, "File that output goes to; there is no input")
_SOCKET = Key("socket", PATH, "UNIX socket that a client connects to")
_IOBASE = Key(
    "iobase",
    ValueType(_parse_io_port, "{:#x}".format, syntax=_IO_PORT_SYNTAX),
    "I/O port of the device, in hex",
)

SERIAL = Schema("--serial", SerialConfig, _FILE, _SOCKET, flags=tuple(_FLAGS))
CONSOLE = Schema("--console", ConsoleConfig, _FILE, _SOCKET, *PCI_KEYS_IOMMU, flags=tuple(_FLAGS))
DEBUG_CONSOLE = Schema("--debug-console", DebugConsoleConfig, _FILE, _IOBASE, flags=tuple(_FLAGS))


def parse_serial(text: str) -> SerialConfig:
    """:raises OptionError: when `text` is not what `--serial` takes."""
    options = SERIAL.parse(text)
    mode = _mode(options, SERIAL)
    return SerialConfig(mode=mode, file=_file(options, mode, SERIAL), socket=_socket(options, mode, SERIAL))


def parse_console(text: str) -> ConsoleConfig:
    """:raises OptionError: when `text` is not what `--console` takes."""
    options = CONSOLE.parse(text)
    mode = _mode(options, CONSOLE)
    file, socket = _file(options, mode, CONSOLE), _socket(options, mode, CONSOLE)
    return ConsoleConfig(mode=mode, file=file, socket=socket, **CONSOLE.convert(options, PCI_KEYS_IOMMU))


def parse_debug_console(text: str) -> DebugConsoleConfig:
    """:raises OptionError: when `text` is not what `--debug-console` takes."""
    options = DEBUG_CONSOLE.parse(text)
    mode = _mode(options, DEBUG_CONSOLE)
    file = _file(options, mode, DEBUG_CONSOLE)
    return DebugConsoleConfig(mode=mode, file=file, **DEBUG_CONSOLE.convert(options, [_IOBASE]))


def format_serial(serial: SerialConfig) -> str:
    """:raises Unprintable: no `--serial` gives `serial`."""
    return SERIAL.format(serial, parse_serial, flag=_WORDS.get(serial.mode))


def format_console(console: ConsoleConfig) -> str:
    """:raises Unprintable: no `--console` gives `console`."""
    return CONSOLE.format(console, parse_console, flag=_WORDS.get(console.mode))


def format_debug_console(console: DebugConsoleConfig) -> str:
    """:raises Unprintable: no `--debug-console` gives `console`."""
    return DEBUG_CONSOLE.format(console, parse_debug_console, flag=_WORDS.get(console.mode))


def _mode(options: Options, schema: Schema) -> ConsoleOutputMode:
    for flag, mode in _FLAGS.items():
        if options.is_set(flag):
            return mode
    if options.is_set("file"):
        return ConsoleOutputMode.FILE
    if options.is_set("socket"):
        return ConsoleOutputMode.SOCKET
    if schema is SERIAL:  # which is `--console` to the reference here
        raise InvalidConsoleMode(CONSOLE.what, hint=f"{SERIAL.what} {SERIAL.syntax}")
    raise InvalidConsoleMode(schema.what, hint=schema.syntax)


def _file(options: Options, mode: ConsoleOutputMode, schema: Schema) -> str | None:
    if mode is not ConsoleOutputMode.FILE:
        return None
    file = options.get("file")
    if file is None:
        raise ValidationFailed(hint=f"{schema.what} {_FILE.syntax}") from ConsoleFileMissing()
    return file


def _socket(options: Options, mode: ConsoleOutputMode, schema: Schema) -> str | None:
    if mode is not ConsoleOutputMode.SOCKET:
        return None
    socket = options.get("socket")
    if socket is None:
        raise ValidationFailed(hint=f"{schema.what} {_SOCKET.syntax}") from ConsoleSocketPathMissing()
    return socket
