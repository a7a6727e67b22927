"""Serial port, virtio console and debug console."""

from __future__ import annotations

import enum

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.number import U16
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.warning import Warn


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


class ConsoleFileMissing(ValidationError):
    """Path missing when using file console mode"""


class ConsoleSocketPathMissing(ValidationError):
    """Path missing when using socket console mode"""


class InvalidIoPortHex(ValidationError):
    def __init__(self, text: str) -> None:
        super().__init__(f"The IO port was not properly provided in hex or a `0x` prefix is missing: {text}")


def check_console_file(console: SerialConfig | ConsoleConfig) -> None:
    if console.mode is ConsoleOutputMode.FILE and console.file is None:
        raise ConsoleFileMissing


def warn_of_shared_terminal(
    console: ConsoleConfig, serial: SerialConfig, debug_console: DebugConsoleConfig, warn: Warn
) -> None:
    """Say so where more than one console is to use the one terminal."""
    names = (("virtio-console", console), ("serial-console", serial), ("debug-console", debug_console))
    on_tty = ", ".join(f'"{name}"' for name, device in names if device.mode is ConsoleOutputMode.TTY)
    if "," in on_tty:
        warn(f"Using TTY output for multiple consoles: [{on_tty}]")
