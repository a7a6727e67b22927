"""The consoles of a VM: opened with its config, handed to the engine, closed with the VM.

Reference: lifecycle.md section 18. A console outlives the machine: over a reboot PTY paths, socket clients
and the content of files stay (Cloud Hypervisor makes all of them anew).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Mapping

import msgspec

from cloudvmm.config.console import (
    ConsoleConfig,
    ConsoleOutputMode,
    DebugConsoleConfig,
    SerialConfig,
)
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.pipe import PipeStream, pipe_path, remove_pipes
from cloudvmm.control.port import PtyPort, SocketPort, TerminalPort
from cloudvmm.control.relay import Line, PairStream, Port, Relay, Stream
from cloudvmm.engine.base import ConsoleSink, SinkKind
from cloudvmm.errors import VmmError
from cloudvmm.host.error import HostError
from cloudvmm.host.terminal import Pty, open_pty

_PIPE_NAMES = ("serial", "console", "debug_console")
_MODES_OF_NONE = (ConsoleOutputMode.OFF, ConsoleOutputMode.NULL)

AnyConsole = SerialConfig | ConsoleConfig | DebugConsoleConfig


class ConsoleError(VmmError):
    """Root of what opening a console raises."""


class CreateConsoleDevice(ConsoleError):
    """Error creating console device"""


class NoSocketOptionSupport(ConsoleError):
    """No socket option support for console device"""


class ConsolePathMissing(ConsoleError):
    """Path missing when using file or socket console mode"""


class KeptPty(msgspec.Struct, frozen=True):
    """A PTY by the numbers of its descriptors in the VMM that made it."""

    master_fd: int
    slave_fd: int
    path: str


class Consoles:
    """Serial port, virtio console and debug console of one VM, in this order."""

    def __init__(
        self,
        vm_config: VmConfig,
        *,
        is_continued: bool = False,
        pipe_dir: str | None = None,
        ptys: Mapping[int, Pty] | None = None,
    ) -> None:
        """Open them all, or none. Those that are `is_continued` another VMM on this host has open, too: what
        is in their files stays, and their sockets lie beside the other's until `take_places`.

        With `pipe_dir` an engine that outlives us has its ends there. `ptys` are those of a VMM that is gone,
        whose engine goes on; its pipes are there, what is in its files stays, its sockets are replaced.

        :raises ConsoleError: one cannot be had; the cause tells why.
        """
        self._pipe_dir = pipe_dir
        self._ptys = dict(ptys or {})
        self._is_adopted = ptys is not None
        self._lines: dict[int, Line] = {}
        self._files: dict[int, str] = {}
        self._pty_paths: dict[int, str] = {}
        self._modes = [console.mode for console in _consoles(vm_config)]
        self._is_terminal_taken = False
        self._is_continued = is_continued
        try:
            self._relay = self._open_all(vm_config)  # None where nobody need be served
        except (OSError, RuntimeError, ValueError, HostError) as error:
            raise CreateConsoleDevice from error

    def sinks(self) -> tuple[ConsoleSink, ConsoleSink, ConsoleSink]:
        """What the engine needs; streams are lent to it and stay ours."""
        serial, console, debug_console = (self._sink(number, mode) for number, mode in enumerate(self._modes))
        return serial, console, debug_console

    @property
    def kept_ptys(self) -> dict[int, KeptPty]:
        """The PTYs, for whoever takes the engine over, which has `kept_fds` open."""
        ptys = {number: line.port for number, line in self._lines.items() if isinstance(line.port, PtyPort)}
        return {
            number: KeptPty(port.pty.master_fd, port.pty.slave_fd, port.pty.path)
            for number, port in ptys.items()
        }

    @property
    def kept_fds(self) -> tuple[int, ...]:
        """What an engine that outlives us is to hold, so that the users' ends stay."""
        return tuple(fd for pty in self.kept_ptys.values() for fd in (pty.master_fd, pty.slave_fd))

    @property
    def has_thread(self) -> bool:
        """Whether a thread of ours serves users' ends, for which `close` waits."""
        return self._relay is not None

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
        if self._relay is not None:
            self._relay.renew_streams()

    def renew_thread(self) -> None:
        """As `Relay.renew_thread`."""
        if self._relay is not None:
            self._relay.renew_thread()

    def take_places(self) -> None:
        """Put sockets where the other VMM has its own. :raises OSError: it cannot be done."""
        for line in self._lines.values():
            if isinstance(line.port, SocketPort):
                line.port.take_place()

    def close(self) -> None:
        """Blocking, briefly. Restore the terminal, remove the socket, close the PTYs."""
        if self._relay is not None:
            self._relay.close()
        if self._pipe_dir is not None:
            for number in self._lines:
                remove_pipes(self._pipe_path(number))

    def _open_all(self, vm_config: VmConfig) -> Relay | None:
        if has_no_console(vm_config):
            return None
        with contextlib.ExitStack() as undo:
            for number, console in enumerate(_consoles(vm_config)):
                port = self._open(number, console)
                if port is not None:
                    undo.callback(port.close)
                    self._lines[number] = Line(port, self._maker(number))
                    undo.callback(self._lines[number].close_stream)
            relay = Relay(list(self._lines.values())) if self._lines else None
            undo.pop_all()
        return relay

    def _maker(self, number: int) -> Callable[[], Stream]:
        if self._pipe_dir is None:
            return PairStream
        path, is_first = self._pipe_path(number), True

        def make() -> Stream:
            nonlocal is_first
            is_continued, is_first = is_first and self._is_adopted, False
            return PipeStream(path, is_continued=is_continued)

        return make

    def _pipe_path(self, number: int) -> str:
        return pipe_path(self._pipe_dir or "", _PIPE_NAMES[number])

    def _open(self, number: int, console: AnyConsole) -> Port | None:
        match console.mode:
            case ConsoleOutputMode.PTY:
                pty = self._ptys.pop(number, None) or open_pty()
                self._pty_paths[number] = pty.path
                return PtyPort(pty)
            case ConsoleOutputMode.TTY:
                is_first, self._is_terminal_taken = not self._is_terminal_taken, True
                return TerminalPort(has_terminal=is_first)
            case ConsoleOutputMode.FILE:
                is_kept = self._is_continued or self._is_adopted
                self._files[number] = _create_file(console.file, is_kept=is_kept)
            case ConsoleOutputMode.SOCKET:
                if self._is_adopted:
                    _remove_socket(console)
                return _open_socket(console, is_beside=self._is_continued)
            case ConsoleOutputMode.OFF | ConsoleOutputMode.NULL:
                pass
        return None

    def _sink(self, number: int, mode: ConsoleOutputMode) -> ConsoleSink:
        if number in self._lines and self._pipe_dir is not None:
            return ConsoleSink(kind=SinkKind.PIPES, path=self._pipe_path(number))
        if number in self._lines:
            return ConsoleSink(kind=SinkKind.STREAM, stream_fd=self._lines[number].stream_fd)
        if number in self._files:
            return ConsoleSink(kind=SinkKind.FILE, path=self._files[number])
        return ConsoleSink(kind=SinkKind.OFF if mode is ConsoleOutputMode.OFF else SinkKind.NULL)


def open_consoles(
    vm_config: VmConfig, *, is_continued: bool = False, pipe_dir: str | None = None
) -> Consoles:
    """Blocking. Open what `vm_config` asks for, as `Consoles` does.

    :raises ConsoleError: one cannot be had; then none is open.
    """
    return Consoles(vm_config, is_continued=is_continued, pipe_dir=pipe_dir)


def remove_all_pipes(pipe_dir: str) -> None:
    """Remove the pipes that a VMM left there whose VM is gone."""
    for name in _PIPE_NAMES:
        remove_pipes(pipe_path(pipe_dir, name))


def has_no_console(vm_config: VmConfig) -> bool:
    """Tell whether `open_consoles` finds nothing to open, and so does not block."""
    return all(console.mode in _MODES_OF_NONE for console in _consoles(vm_config))


def _consoles(vm_config: VmConfig) -> tuple[AnyConsole, AnyConsole, AnyConsole]:
    return vm_config.serial, vm_config.console, vm_config.debug_console


def _create_file(path: str | None, *, is_kept: bool) -> str:
    if not path:
        raise ConsolePathMissing
    # Non-blocking for the open alone: a FIFO that nobody reads must not hang us.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    os.close(os.open(path, flags if is_kept else flags | os.O_TRUNC, 0o600))
    return path


def _remove_socket(console: AnyConsole) -> None:
    """Remove what a VMM that was killed has left where its socket was."""
    path = console.socket if isinstance(console, SerialConfig) else None
    with contextlib.suppress(OSError, ValueError):
        if path and stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def _open_socket(console: AnyConsole, *, is_beside: bool) -> SocketPort:
    if not isinstance(console, SerialConfig):
        raise NoSocketOptionSupport
    if not console.socket:
        raise ConsolePathMissing
    return SocketPort(console.socket, is_beside=is_beside)
