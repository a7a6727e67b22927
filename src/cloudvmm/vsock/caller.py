"""A program of the host that has connected, and has not said yet which port of the guest it wants."""

from __future__ import annotations

import socket
from typing import Final

_WORD: Final = b"connect "
_LINE_LIMIT: Final = 32
_PORT_LIMIT: Final = 0xFFFFFFFF


class NoPort(Exception):
    """The program left, or said something else."""


class Caller:
    """Owns `host`, which does not block."""

    def __init__(self, host: socket.socket) -> None:
        self.host = host

    def read_port(self, *, has_ended: bool) -> int | None:
        """Return the port of the line ``CONNECT <port>``; None while it is not there wholly.

        `has_ended` says that the program sends no more. Nothing behind the line is taken from the socket.

        :raises NoPort: there will be no such line.
        """
        try:
            seen = self.host.recv(_LINE_LIMIT, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise NoPort from error
        line, end, _ = seen.partition(b"\n")
        if not seen or line[: len(_WORD)].lower() != _WORD[: len(line)]:
            raise NoPort
        if not end:
            if has_ended or len(seen) == _LINE_LIMIT:
                raise NoPort
            return None
        self.host.recv(len(line) + 1)
        return _port(line[len(_WORD) :])

    def close(self) -> None:
        self.host.close()


def _port(word: bytes) -> int:
    digits = word.strip().removeprefix(b"+")
    if not digits.isdigit() or int(digits) > _PORT_LIMIT:
        raise NoPort
    return int(digits)
