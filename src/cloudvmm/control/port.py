"""The user's side of a console: a PTY, the process's own terminal, or a UNIX socket."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import sys

from cloudvmm.control.relay import CHUNK_BYTES, write_some
from cloudvmm.host.terminal import Pty, RawTerminal

# POSIX lets a pipe that polls as writable take this much at once.
PIPE_BYTES = 4096
# The least that the kernel keeps free in a terminal which polls as writable.
TERMINAL_BYTES = 256


class PtyPort:
    """Owns `pty`. Whoever opens its path sees what was said meanwhile."""

    def __init__(self, pty: Pty) -> None:
        self.pty = pty

    def listen_fd(self) -> int | None:
        return None

    def accept(self) -> None:
        """Nobody comes."""

    def input_fds(self) -> list[int]:
        return [self.pty.master_fd]

    def output_fd(self) -> int | None:
        return self.pty.master_fd

    def receive(self, fd: int) -> bytes:
        with contextlib.suppress(OSError):
            return os.read(fd, CHUNK_BYTES)
        return b""

    def send(self, data: bytes) -> int:
        return write_some(self.pty.master_fd, data)

    def close(self) -> None:
        self.pty.close()


class TerminalPort:
    """The process's standard output, and its standard input where that is a terminal.

    The open file of standard output is shared with whoever started the process, so it is not made
    non-blocking: a terminal or pipe is opened once more for ourselves. Where that is not possible, only what
    it is sure to take at once is written.
    """

    def __init__(self, *, has_terminal: bool) -> None:
        """`has_terminal` says whose console may read from the terminal and put it into raw mode.

        :raises OSError: out of descriptors.
        """
        with contextlib.ExitStack() as undo:
            self._output_fd, self._chunk_bytes = _open_output()
            undo.callback(os.close, self._output_fd)
            self._input_fd: int | None = None
            self._raw: RawTerminal | None = None
            if has_terminal:
                self._input_fd = _open_input()
                self._raw = RawTerminal(self._output_fd)
            undo.pop_all()

    def listen_fd(self) -> int | None:
        return None

    def accept(self) -> None:
        """Nobody comes."""

    def input_fds(self) -> list[int]:
        return [] if self._input_fd is None else [self._input_fd]

    def output_fd(self) -> int | None:
        return self._output_fd

    def receive(self, fd: int) -> bytes:
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(fd, PIPE_BYTES)
        if not data and self._input_fd is not None:
            os.close(self._input_fd)
            self._input_fd = None
        return data

    def send(self, data: bytes) -> int:
        if self._chunk_bytes is None:
            return write_some(self._output_fd, data)
        poller = select.poll()
        poller.register(self._output_fd, select.POLLOUT)
        return write_some(self._output_fd, data[: self._chunk_bytes]) if poller.poll(0) else 0

    def close(self) -> None:
        if self._raw is not None:
            self._raw.restore()
        os.close(self._output_fd)
        if self._input_fd is not None:
            os.close(self._input_fd)


def _open_output() -> tuple[int, int | None]:
    """Return a descriptor of standard output, and how much to write at once; None where it never blocks."""
    if sys.__stdout__ is None:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), None
    fd = sys.__stdout__.fileno()
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.dup(fd), None
    try:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{fd}", flags), None
    except OSError:  # a socket, or somebody else's terminal
        return os.dup(fd), PIPE_BYTES if stat.S_ISFIFO(mode) else TERMINAL_BYTES


def _open_input() -> int | None:
    if sys.__stdin__ is None or not os.isatty(sys.__stdin__.fileno()):
        return None
    return os.dup(sys.__stdin__.fileno())


class SocketPort:
    """A listening UNIX socket at `path`, with one client at a time: a new one takes the old one's place.

    One `is_beside` another VMM's socket at `path` is moved there by `take_place`.
    """

    def __init__(self, path: str, *, is_beside: bool = False) -> None:
        """:raises OSError: the path exists, or cannot be bound. :raises ValueError: it holds a NUL."""
        if "\0" in path:
            raise ValueError(
                "embedded null byte"
            )  # the kernel would take it as a name outside the file system
        self._final_path = path
        self._path = f"{path}.{os.getpid()}" if is_beside else path
        self._client: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            os.fchmod(self._listener.fileno(), 0o600)
            self._listener.bind(self._path)
            self._inode = os.lstat(self._path).st_ino
            self._listener.listen(1)
            self._listener.setblocking(False)
        except OSError:
            self._listener.close()
            raise

    def take_place(self) -> None:
        """:raises OSError: the system refuses."""
        if self._path != self._final_path:
            os.rename(self._path, self._final_path)
            self._path = self._final_path

    def listen_fd(self) -> int | None:
        return self._listener.fileno()

    def input_fds(self) -> list[int]:
        return [] if self._client is None else [self._client.fileno()]

    def output_fd(self) -> int | None:
        return None if self._client is None else self._client.fileno()

    def receive(self, fd: int) -> bytes:
        if self._client is None:
            return b""
        try:
            data = self._client.recv(CHUNK_BYTES)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._drop_client()
        return data

    def send(self, data: bytes) -> int:
        if self._client is None:
            return 0
        try:
            return self._client.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self._drop_client()
            return 0

    def close(self) -> None:
        self._drop_client()
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.lstat(self._path).st_ino == self._inode:  # another VMM may have taken the place
                os.unlink(self._path)

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            self._drop_client()
            client.setblocking(False)
            self._client = client

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
