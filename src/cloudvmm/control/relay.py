"""Moving bytes between the engine's console streams and whoever looks at them.

One thread serves all consoles of a VM. Output that nobody takes is kept, up to `RING_BYTES`, the oldest
dropped first; it never holds the guest up. Input is read only as fast as the guest takes it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from cloudvmm.host.eventfd import EventFd

RING_BYTES = 1 << 20
INPUT_BYTES = 1 << 16
CHUNK_BYTES = 1 << 16
_SO_SNDBUFFORCE = 32  # Linux; `socket` has no name for it


class Port(Protocol):
    """The user's side of a console. Called by the relay's thread alone; never blocks."""

    def listen_fd(self) -> int | None:
        """A descriptor that is readable when somebody new wants to come, if the port takes new ones."""

    def accept(self) -> None:
        """Let the new one in, in place of the old one."""

    def input_fds(self) -> list[int]:
        """Descriptors that are readable when there is something to do for `receive`."""

    def output_fd(self) -> int | None:
        """The descriptor that `send` writes to; None while nobody is there."""

    def receive(self, fd: int) -> bytes:
        """Take what is there on `fd`, perhaps nothing."""

    def send(self, data: bytes) -> int:
        """Write the start of `data`; return how much went."""

    def close(self) -> None:
        """Release what the port owns."""


class Stream(Protocol):
    """The way between a console's line and the engine. Never blocks."""

    @property
    def read_fd(self) -> int:
        """What is readable when `read` has something."""

    @property
    def write_fd(self) -> int:
        """What is writable when `write` takes something."""

    @property
    def engine_fd(self) -> int | None:
        """The engine's end, which is lent to it; None where it has a path."""

    def read(self) -> bytes:
        """Return what is there; nothing at the end. :raises OSError: there is nothing."""

    def write(self, data: bytes) -> int:
        """Write the start of `data`; return how much went. :raises OSError: nothing goes."""

    def close(self) -> None:
        """Release it."""


class PairStream:
    """Two sockets, one of which the engine gets."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        _make_room(self._theirs)

    @property
    def read_fd(self) -> int:
        return self._ours.fileno()

    @property
    def write_fd(self) -> int:
        return self._ours.fileno()

    @property
    def engine_fd(self) -> int | None:
        return self._theirs.fileno()

    def read(self) -> bytes:
        return self._ours.recv(CHUNK_BYTES)

    def write(self, data: bytes) -> int:
        return self._ours.send(data)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


class Line:
    """One console: the engine's stream, which `make` makes, the user's port, and what waits between them."""

    def __init__(self, port: Port, make: Callable[[], Stream] = PairStream) -> None:
        self.port = port
        self.output = bytearray()
        self.input = bytearray()
        self._make = make
        self._stream: Stream | None = make()

    @property
    def stream_fd(self) -> int | None:
        """The engine's end, which is lent to it; None where it has a path."""
        assert self._stream is not None
        return self._stream.engine_fd

    def renew(self) -> None:
        """Make a new stream for a new machine; what the last one said and nobody took yet is kept."""
        self.take_output()
        self.close_stream()
        self.input.clear()
        self._stream = self._make()

    def close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def register(self, poller: select.poll) -> None:
        wants: dict[int, int] = {}
        if self._stream is not None:
            wants[self._stream.read_fd] = select.POLLIN
            if self.input:
                wants[self._stream.write_fd] = wants.get(self._stream.write_fd, 0) | select.POLLOUT
        if len(self.input) < INPUT_BYTES:
            wants |= dict.fromkeys(self.port.input_fds(), select.POLLIN)
        listen_fd = self.port.listen_fd()
        if listen_fd is not None:
            wants[listen_fd] = select.POLLIN
        output_fd = self.port.output_fd()
        if output_fd is not None and self.output:
            wants[output_fd] = wants.get(output_fd, 0) | select.POLLOUT
        for fd, events in wants.items():
            poller.register(fd, events)

    def serve(self, ready: dict[int, int]) -> None:
        """Move what can be moved without waiting."""
        if self._stream is not None and ready.get(self._stream.read_fd, 0) & select.POLLIN:
            self.take_output()
        if self.port.listen_fd() in ready:
            self.port.accept()
        for fd in self.port.input_fds():
            if ready.get(fd, 0) & ~select.POLLOUT:
                self.input += self.port.receive(fd)
        self.give_input()
        if self.port.output_fd() in ready:
            self.give_output()

    def take_output(self) -> None:
        """Take what the engine has written so far; no more than that, lest the other consoles wait."""
        with contextlib.suppress(OSError):
            for _ in range(RING_BYTES // CHUNK_BYTES):
                if self._stream is None or not (data := self._stream.read()):
                    return
                self.output += data
                del self.output[: max(0, len(self.output) - RING_BYTES)]

    def give_input(self) -> None:
        with contextlib.suppress(OSError):
            while self.input and self._stream is not None:
                del self.input[: self._stream.write(bytes(self.input))]

    def give_output(self) -> None:
        while self.output and self.port.output_fd() is not None:
            sent = self.port.send(bytes(self.output[:CHUNK_BYTES]))
            if sent == 0:
                return
            del self.output[:sent]


class Relay:
    """The thread that serves `lines`, of which there is one at least."""

    def __init__(self, lines: list[Line]) -> None:
        self._lines = lines
        self._wake = EventFd()
        self._lock = threading.Lock()
        self._is_stopped = False
        self._thread: threading.Thread
        self._start(None)

    def renew_streams(self) -> None:
        """Give every line a new stream."""
        with self._lock:
            for line in self._lines:
                line.renew()
        self._wake.write()

    def renew_thread(self) -> None:
        """Let another thread go on. It inherits what is the caller's.

        :raises RuntimeError: the host gives no thread; then nobody serves.
        """
        self._start(self._thread)

    def close(self) -> None:
        """Blocking, briefly. Pass on what can still be passed on without waiting, then release everything."""
        with self._lock:
            self._is_stopped = True
        self._wake.write()
        self._thread.join()
        # The last one opened first, so that a terminal gets back the settings that it had at the start.
        for line in reversed(self._lines):
            line.take_output()
            line.give_output()
            line.close_stream()
            line.port.close()
        self._wake.close()

    def _start(self, before: threading.Thread | None) -> None:
        thread = threading.Thread(target=self._run, args=(before,), name="console", daemon=True)
        with self._lock:
            self._thread = thread
        self._wake.write()
        thread.start()

    def _run(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        while (poller := self._next_poller()) is not None:
            ready = dict(poller.poll())
            self._wake.read()
            with self._lock:
                for line in () if self._is_stopped else self._lines:
                    line.serve(ready)

    def _next_poller(self) -> select.poll | None:
        """What to wait for next; None when it is time to end."""
        with self._lock:
            if self._is_stopped or self._thread is not threading.current_thread():
                return None
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            for line in self._lines:
                line.register(poller)
            return poller


def _make_room(end: socket.socket) -> None:
    """Let much be written to `end` that is not read yet: of a virtio console QEMU drops what does not fit.

    Each write takes some hundred bytes, and a guest may make one for each of its lines.
    """
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, RING_BYTES)
    except OSError:  # that is for root alone
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, RING_BYTES)  # as much as the host allows


def write_some(fd: int, data: bytes) -> int:
    """Write to `fd` what it takes now; a descriptor that is broken takes everything, into nothing."""
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0
    except OSError:
        return len(data)
