"""Terminals: making one (a PTY), and taking over the one that the process was started on."""

from __future__ import annotations

import contextlib
import os
import termios
import tty

import msgspec

from cloudvmm.host.error import HostError


class PtyError(HostError):
    """A pseudo-terminal could not be made"""


class Pty(msgspec.Struct):
    """A pseudo-terminal in raw mode; owns both descriptors.

    The slave stays open here too: so the master does not report a hang-up while nobody else has it open, and
    what is written meanwhile waits for the next reader.
    """

    master_fd: int
    slave_fd: int
    path: str

    def close(self) -> None:
        """Close both; idempotent."""
        for name in ("master_fd", "slave_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                os.close(fd)


def open_pty() -> Pty:
    """Make a pseudo-terminal.

    :raises PtyError: the system has none to give.
    """
    try:
        master_fd, slave_fd = os.openpty()
    except OSError as error:
        raise PtyError from error
    try:
        tty.setraw(slave_fd)
        os.set_blocking(master_fd, False)
        return Pty(master_fd, slave_fd, os.ttyname(slave_fd))
    except (OSError, termios.error) as error:
        os.close(master_fd)
        os.close(slave_fd)
        raise PtyError from error


class RawTerminal:
    """Puts the terminal behind a descriptor into raw mode until `restore`; does nothing to what is none."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: list[int | list[bytes | int]] | None = None
        with contextlib.suppress(OSError, termios.error):
            if os.isatty(fd):
                self._saved = termios.tcgetattr(fd)
                tty.setraw(fd)

    def restore(self) -> None:
        if self._saved is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
            self._saved = None
