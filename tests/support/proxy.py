"""A TCP proxy that a test can slow down, stop, cut or falsify: the network between two hosts on a bad day."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

_CHUNK_BYTES = 64 * 1024
_CONNECT_S = 10.0

Alter = Callable[[bytes], bytes]


class Proxy:
    """Passes on what comes to `url`, to `host` and `port`; at `bytes_per_s` over each connection, if set."""

    def __init__(self, host: str, port: int, *, bytes_per_s: float | None = None) -> None:
        self._target = (host, port)
        self._bytes_per_s = bytes_per_s
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._may_pass = threading.Event()
        self._may_pass.set()
        self._rewrite: Alter | None = None
        self._corrupted: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, *self._sockets):
            sock.close()

    @property
    def count(self) -> int:
        """How many connections there are, or were."""
        return len(self._sockets) // 2

    def stop(self) -> None:
        """Pass nothing on, and let nobody know."""
        self._may_pass.clear()

    def go_on(self) -> None:
        """Pass on again, what waits first."""
        self._may_pass.set()

    def cut(self, number: int | None = None) -> None:
        """End every connection, or that which was the `number`th, from 0, if there is one."""
        if number is None:
            self._may_pass.set()
        for sock in self._pair(number):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def corrupt(self, number: int) -> None:
        """Change a bit of what is next passed on over the connection `number`, either way."""
        self._corrupted.update(self._pair(number))

    def rewrite(self, alter: Alter) -> None:
        """From here on pass on what `alter` makes of each piece, which has the same length."""
        self._rewrite = alter

    def _pair(self, number: int | None) -> list[socket.socket]:
        sockets = list(self._sockets)
        return sockets if number is None else sockets[2 * number : 2 * number + 2]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target, timeout=_CONNECT_S)
                except OSError:
                    near.close()  # as if nobody listened
                    continue
                far.settimeout(None)
                self._sockets += [near, far]
                self._start(self._pass_on, near, far)
                self._start(self._pass_on, far, near)

    def _start(self, call: object, *words: object) -> None:
        self._threads.append(threading.Thread(target=call, args=words))  # type: ignore[arg-type]
        self._threads[-1].start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(_CHUNK_BYTES):
                self._may_pass.wait()
                other.sendall(self._altered(one, data))
                if self._bytes_per_s is not None:
                    time.sleep(len(data) / self._bytes_per_s)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)

    def _altered(self, one: socket.socket, data: bytes) -> bytes:
        if self._rewrite is not None:
            data = self._rewrite(data)
        if one in self._corrupted:
            self._corrupted.discard(one)
            data = data[:-1] + bytes([data[-1] ^ 1])
        return data
