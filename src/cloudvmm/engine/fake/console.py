"""The fake guest's consoles: a ready line when it boots, then every line it is sent, sent back.

One thread per machine serves the streams, from boot to close. Files get the ready line and nothing else; the
debug console stays silent.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from typing import Final

from cloudvmm.engine.base import ConsoleSink, DeviceError, SinkKind
from cloudvmm.host.eventfd import EventFd

READY_LINE: Final = b"cloudvmm-guest ready uptime=0.00\n"
MAX_LINE_BYTES: Final = 4096
# A reader that does not read loses output, as at a real serial port; it never stops the guest.
MAX_PENDING_BYTES: Final = 64 * 1024
_DONT_WAIT: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class StreamPort:
    """One end of a stream. Owns a duplicate of the descriptor, whose flags it leaves alone."""

    def __init__(self, stream_fd: int) -> None:
        self._socket = socket.socket(fileno=os.dup(stream_fd))
        self._line = b""
        self._pending = b""
        self.is_open = True

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def interest(self) -> int:
        return select.POLLIN | (select.POLLOUT if self._pending else 0)

    def say(self, text: bytes) -> None:
        """Write `text`, as much as goes; the rest waits for `flush`."""
        self._pending = (self._pending + text)[:MAX_PENDING_BYTES]
        self.flush()

    def flush(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._socket.send(self._pending, _DONT_WAIT) :]
        except BlockingIOError:
            return
        except OSError:
            self.is_open = False

    def echo(self) -> None:
        """Read what came and send whole lines back."""
        try:
            data = self._socket.recv(MAX_LINE_BYTES, _DONT_WAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.is_open = False
            return
        *lines, self._line = (self._line + data).split(b"\n")
        if len(self._line) >= MAX_LINE_BYTES:
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            self.say(line + b"\n")

    def close(self) -> None:
        self.is_open = False
        self._socket.close()


class FilePort:
    """A file that exists and is appended to. Owns its descriptor."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def say(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk does not stop a guest
            os.write(self._fd, text)

    def close(self) -> None:
        os.close(self._fd)


class Console:
    """All consoles of one machine."""

    def __init__(self, *sinks: ConsoleSink) -> None:
        """Open `sinks`.

        :raises DeviceError: a file or a stream cannot be had; then none is left open.
        """
        self._wake = EventFd()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # held while ports are served
        self._is_awake = False
        self._is_stopped = False
        self._ports: list[StreamPort | FilePort] = []
        for sink in sinks:
            try:
                self._open(sink)
            except OSError as error:
                self.close()
                raise DeviceError("A console cannot be opened") from error

    def _open(self, sink: ConsoleSink) -> None:
        if sink.kind is SinkKind.STREAM and sink.stream_fd is not None:
            self._ports.append(StreamPort(sink.stream_fd))
        elif sink.kind is SinkKind.FILE and sink.path is not None:
            self._ports.append(FilePort(sink.path))

    def start(self, *, is_fresh: bool = True) -> None:
        """Serve the streams from here on; a guest that is fresh is awake and says that it is ready."""
        for port in self._ports if is_fresh else ():
            port.say(READY_LINE)
        self._is_awake = is_fresh
        if any(isinstance(port, StreamPort) for port in self._ports):
            self._thread = threading.Thread(target=self._serve, name="fake-guest", daemon=True)
            self._thread.start()

    def set_awake(self, is_awake: bool) -> None:
        """A sleeping guest reads nothing; what is sent meanwhile waits in the stream."""
        with self._lock:
            self._is_awake = is_awake
        self._wake.write()

    def stop(self) -> None:
        """End the thread soon; does not wait for it."""
        self._is_stopped = True
        self._wake.write()

    def close(self) -> None:
        """Blocking. End the thread and release every descriptor."""
        self.stop()
        if self._thread is not None:
            self._thread.join()
        for port in self._ports:
            port.close()
        self._wake.close()

    def _serve(self) -> None:
        streams = [port for port in self._ports if isinstance(port, StreamPort)]
        while not self._is_stopped:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            served = {port.fileno(): port for port in streams if port.is_open and self._is_awake}
            for port in served.values():
                poll.register(port, port.interest)
            found = poll.poll()
            self._wake.read()
            with self._lock:
                for fd, ready in found if self._is_awake else ():
                    if fd in served:
                        _serve_port(served[fd], ready)


def _serve_port(port: StreamPort, ready: int) -> None:
    if ready & select.POLLOUT:
        port.flush()
    if ready & ~select.POLLOUT:
        port.echo()
