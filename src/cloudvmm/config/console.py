"""Serial port, virtio console and debug console."""

from __future__ import annotations

import enum

import msgspec

from cloudvmm.config.number import U16
from cloudvmm.config.pci import PciDevice


class ConsoleOutputMode(enum.Enum):
    OFF = "Off"
    PTY = "Pty"
    TTY = "Tty"
    FILE = "File"
    SOCKET = "Socket"
    NULL = "Null"


class SerialConfig(msgspec.Struct, kw_only=True):
    file: str | None = None
    mode: ConsoleOutputMode
    socket: str | None = None


class ConsoleConfig(PciDevice, kw_only=True):
    file: str | None = None
    mode: ConsoleOutputMode
    socket: str | None = None


class DebugConsoleConfig(msgspec.Struct, kw_only=True):
    file: str | None = None
    mode: ConsoleOutputMode
    iobase: U16 | None = None


DEFAULT_DEBUG_CONSOLE_IOBASE = 0xE9
