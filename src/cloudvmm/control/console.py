"""The consoles of a VM: opened with its config, handed to the engine, closed with the VM.

Reference: lifecycle.md section 18. A console outlives the machine: over a reboot PTY paths, socket clients
and the content of files stay (Cloud Hypervisor makes all of them anew).
"""

from __future__ import annotations

import contextlib
import os

from cloudvmm.config.console import (
    ConsoleConfig,
    ConsoleOutputMode,
    DebugConsoleConfig,
    SerialConfig,
)
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.port import PtyPort, SocketPort, TerminalPort
from cloudvmm.control.relay import Line, Port, Relay
from cloudvmm.engine.base import ConsoleSink, SinkKind
from cloudvmm.errors import VmmError
from cloudvmm.host.error import HostError
from cloudvmm.host.terminal import open_pty

AnyConsole = SerialConfig | ConsoleConfig | DebugConsoleConfig


class ConsoleError(VmmError):
    """Root of what opening a console raises."""


class CreateConsoleDevice(ConsoleError):
    """Error creating console device"""


class NoSocketOptionSupport(ConsoleError):
    """No socket option support for console device"""


class ConsolePathMissing(ConsoleError):
    """Path missing when using file or socket console mode"""


class Consoles:
    """Serial port, virtio console and debug console of one VM, in this order."""

    def __init__(self, vm_config: VmConfig, *, is_continued: bool = False) -> None:
        """Open them all, or none. Those that are `is_continued` another VMM on this host has open, too: what
        is in their files stays, and their sockets lie beside the other's until `take_places`.

        :raises ConsoleError: one cannot be had; the cause tells why.
        """
        self._lines: dict[int, Line] = {}
        self._files: dict[int, str] = {}
        self._pty_paths: dict[int, str] = {}
        self._modes = [console.mode for console in _consoles(vm_config)]
        self._is_terminal_taken = False
        self._is_continued = is_continued
        try:
            self._relay = self._open_all(vm_config)
        except (OSError, RuntimeError, ValueError, HostError) as error:
            raise CreateConsoleDevice from error

    def sinks(self) -> tuple[ConsoleSink, ConsoleSink, ConsoleSink]:
        """What the engine needs; streams are lent to it and stay ours."""
        serial, console, debug_console = (self._sink(number, mode) for number, mode in enumerate(self._modes))
        return serial, console, debug_console

    @property
    def has_pty(self) -> bool:
        """Whether `write_paths` has anything to write."""
        return bool(self._pty_paths)

    def write_paths(self, vm_config: VmConfig) -> None:
        """Write the path of each PTY into `vm_config`, as `vm.info` shows it."""
        for number, console in enumerate(_consoles(vm_config)):
            console.file = self._pty_paths.get(number, console.file)

    def renew_streams(self) -> None:
        """Make new streams for a new machine; the users' ends stay as they are."""
        self._relay.renew_streams()

    def take_places(self) -> None:
        """Put sockets where the other VMM has its own. :raises OSError: it cannot be done."""
        for line in self._lines.values():
            if isinstance(line.port, SocketPort):
                line.port.take_place()

    def close(self) -> None:
        """Blocking, briefly. Restore the terminal, remove the socket, close the PTYs."""
        self._relay.close()

    def _open_all(self, vm_config: VmConfig) -> Relay:
        with contextlib.ExitStack() as undo:
            for number, console in enumerate(_consoles(vm_config)):
                port = self._open(number, console)
                if port is not None:
                    undo.callback(port.close)
                    self._lines[number] = Line(port)
                    undo.callback(self._lines[number].close_stream)
            relay = Relay(list(self._lines.values()))
            undo.pop_all()
        return relay

    def _open(self, number: int, console: AnyConsole) -> Port | None:
        match console.mode:
            case ConsoleOutputMode.PTY:
                pty = open_pty()
                self._pty_paths[number] = pty.path
                return PtyPort(pty)
            case ConsoleOutputMode.TTY:
                is_first, self._is_terminal_taken = not self._is_terminal_taken, True
                return TerminalPort(has_terminal=is_first)
            case ConsoleOutputMode.FILE:
                self._files[number] = _create_file(console.file, is_kept=self._is_continued)
            case ConsoleOutputMode.SOCKET:
                return _open_socket(console, is_beside=self._is_continued)
            case ConsoleOutputMode.OFF | ConsoleOutputMode.NULL:
                pass
        return None

    def _sink(self, number: int, mode: ConsoleOutputMode) -> ConsoleSink:
        if number in self._lines:
            return ConsoleSink(kind=SinkKind.STREAM, stream_fd=self._lines[number].stream_fd)
        if number in self._files:
            return ConsoleSink(kind=SinkKind.FILE, path=self._files[number])
        return ConsoleSink(kind=SinkKind.OFF if mode is ConsoleOutputMode.OFF else SinkKind.NULL)


def open_consoles(vm_config: VmConfig, *, is_continued: bool = False) -> Consoles:
    """Blocking. Open what `vm_config` asks for, as `Consoles` does.

    :raises ConsoleError: one cannot be had; then none is open.
    """
    return Consoles(vm_config, is_continued=is_continued)


def _consoles(vm_config: VmConfig) -> tuple[AnyConsole, AnyConsole, AnyConsole]:
    return vm_config.serial, vm_config.console, vm_config.debug_console


def _create_file(path: str | None, *, is_kept: bool) -> str:
    if not path:
        raise ConsolePathMissing
    # Non-blocking for the open alone: a FIFO that nobody reads must not hang us.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    os.close(os.open(path, flags if is_kept else flags | os.O_TRUNC, 0o600))
    return path


def _open_socket(console: AnyConsole, *, is_beside: bool) -> SocketPort:
    if not isinstance(console, SerialConfig):
        raise NoSocketOptionSupport
    if not console.socket:
        raise ConsolePathMissing
    return SocketPort(console.socket, is_beside=is_beside)
