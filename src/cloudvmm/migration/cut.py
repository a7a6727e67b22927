"""Ending what two VMMs do together, from any thread."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

from cloudvmm.host.eventfd import EventFd
from cloudvmm.migration.error import Cancelled, LinkTimeout


class Cut:
    """Whole until `now`, once and for ever; every wait on it then fails, and its sockets are shut down."""

    def __init__(self) -> None:
        self._event = EventFd()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_cut = False

    @property
    def is_cut(self) -> bool:
        return self._is_cut

    def now(self) -> None:
        with self._lock:
            if not self._is_cut:
                self._is_cut = True
                self._event.write()
                for sock in self._sockets:
                    _shut(sock)

    def covers(self, sock: socket.socket) -> None:
        """From here on a cut shuts `sock` down, which stays the caller's."""
        with self._lock:
            self._sockets.append(sock)
            if self._is_cut:
                _shut(sock)

    def forget(self, sock: socket.socket) -> None:
        """`sock` is about to be closed."""
        with self._lock:
            if sock in self._sockets:
                self._sockets.remove(sock)

    def wait(
        self,
        sock: socket.socket,
        events: int,
        *,
        deadline_s: float | None,
        timeout_s: float,
        other_fd: int | None = None,
    ) -> bool:
        """Block until `sock` is ready for `events`. `deadline_s` is monotonic; None waits for ever.

        Returns whether it is; False where `other_fd` has something to read instead.

        :raises Cancelled: it is cut.
        :raises LinkTimeout: the deadline, `timeout_s` after its start, has passed.
        """
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        poll.register(sock, events)
        if other_fd is not None:
            poll.register(other_fd, select.POLLIN)
        while True:
            left_ms = None if deadline_s is None else max(0.0, deadline_s - time.monotonic()) * 1000
            ready = dict(poll.poll(left_ms))
            if self._is_cut:
                raise Cancelled
            if ready:
                return sock.fileno() in ready
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise LinkTimeout(timeout_s)

    def pause(self, pause_s: float) -> None:
        """Block for `pause_s` seconds.

        :raises Cancelled: it is cut.
        """
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        poll.poll(pause_s * 1000)
        if self._is_cut:
            raise Cancelled

    def close(self) -> None:
        """Release the descriptor; nobody waits any more."""
        with self._lock:
            self._is_cut = True
            self._sockets.clear()
            self._event.close()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
