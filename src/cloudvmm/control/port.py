"""The user's side of a console: a PTY, the process's own terminal, or a UNIX socket."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys

from cloudvmm.control.relay import CHUNK_BYTES, write_some
from cloudvmm.host.terminal import Pty, RawTerminal

# POSIX lets a pipe that polls as writable take this much at once.
PIPE_BYTES = 4096


class PtyPort:
    """Owns `pty`. Whoever opens its path sees what was said meanwhile."""

    def __init__(self, pty: Pty) -> None:
        self._pty = pty

    def input_fds(self) -> list[int]:
        return [self._pty.master_fd]

    def output_fd(self) -> int | None:
        return self._pty.master_fd

    def receive(self, fd: int) -> bytes:
        with contextlib.suppress(OSError):
            return os.read(fd, CHUNK_BYTES)
        return b""

    def send(self, data: bytes) -> int:
        return write_some(self._pty.master_fd, data)

    def close(self) -> None:
        self._pty.close()


class TerminalPort:
    """The process's standard output, and its standard input where that is a terminal.

    Neither is made non-blocking: their open files are shared with whoever started the process. Output goes in
    pieces that a descriptor which polls as writable takes at once.
    """

    def __init__(self, *, reads_input: bool) -> None:
        self._output_fd = (
            os.dup(sys.__stdout__.fileno()) if sys.__stdout__ else os.open(os.devnull, os.O_WRONLY)
        )
        self._raw = RawTerminal(self._output_fd)
        self._input_fd: int | None = None
        if reads_input and sys.__stdin__ is not None and os.isatty(sys.__stdin__.fileno()):
            self._input_fd = os.dup(sys.__stdin__.fileno())

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
        is_file = stat.S_ISREG(os.fstat(self._output_fd).st_mode)
        return write_some(self._output_fd, data if is_file else data[:PIPE_BYTES])

    def close(self) -> None:
        self._raw.restore()
        os.close(self._output_fd)
        if self._input_fd is not None:
            os.close(self._input_fd)


class SocketPort:
    """A listening UNIX socket at `path`, with one client at a time: a new one takes the old one's place."""

    def __init__(self, path: str) -> None:
        """:raises OSError: the path exists, or cannot be bound. :raises ValueError: it holds a NUL."""
        if "\0" in path:
            raise ValueError(
                "embedded null byte"
            )  # the kernel would take it as a name outside the file system
        self._path = path
        self._client: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            os.fchmod(self._listener.fileno(), 0o600)
            self._listener.bind(path)
            self._listener.listen(1)
            self._listener.setblocking(False)
        except OSError:
            self._listener.close()
            raise

    def input_fds(self) -> list[int]:
        fds = [self._listener.fileno()]
        if self._client is not None:
            fds.append(self._client.fileno())
        return fds

    def output_fd(self) -> int | None:
        return None if self._client is None else self._client.fileno()

    def receive(self, fd: int) -> bytes:
        if fd == self._listener.fileno():
            self._accept()
            return b""
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
            os.unlink(self._path)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            self._drop_client()
            client.setblocking(False)
            self._client = client

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
