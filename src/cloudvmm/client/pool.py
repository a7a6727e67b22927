"""Connections that are kept after a request, for the next one. Belongs to a client; any thread may use it.

A child of `fork` has the parent's connections too. If both used one, each could read the other's answers: so
a child closes its copies, which the parent does not notice, and begins anew.
"""

from __future__ import annotations

import os
import socket
from typing import Final

MAX_IDLE: Final = 2  # a server has room for ten connections, and others want some of these


class ConnectionPool:
    """Owns what is in it."""

    __slots__ = ("_idle", "_pid")

    def __init__(self) -> None:
        self._idle: list[socket.socket] = []
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self._idle)

    def take(self) -> socket.socket | None:
        """Give a good one, if any; close those that the server has closed or written to unasked."""
        self._leave_parents()
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was faster
                return None
            if _is_good(connection):
                return connection
            connection.close()
        return None

    def put(self, connection: socket.socket) -> None:
        """Keep `connection`, or close it where there are enough."""
        self._leave_parents()
        if len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close all; the pool can be used again."""
        while (connection := self.take()) is not None:
            connection.close()

    def _leave_parents(self) -> None:
        if self._pid == (pid := os.getpid()):
            return
        inherited, self._idle, self._pid = self._idle, [], pid
        for connection in inherited:
            connection.close()


def _is_good(connection: socket.socket) -> bool:
    try:
        connection.setblocking(False)
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
