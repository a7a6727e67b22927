"""Terminals: making one (a PTY), and taking over the one that the process was started on."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import tty
from typing import Any

import msgspec

from cloudvmm.host.error import HostError

Settings = list[Any]  # as termios has them

# A background process that changes its terminal is stopped unless it ignores SIGTTOU.
_GUARD_SCRIPT = """trap '' HUP INT QUIT TERM TSTP TTIN TTOU; read -r _ || stty "$0" <&1"""


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
    """Puts the terminal behind a descriptor into raw mode until `restore`; does nothing to what is none.

    A process that is killed cannot restore it: a shell of its own, which waits for that end, then does.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved: Settings | None = None
        self._guard: _Guard | None = None
        with contextlib.suppress(OSError, termios.error):
            if os.isatty(fd):
                self._saved = termios.tcgetattr(fd)
                with contextlib.suppress(OSError):
                    self._guard = _Guard(fd, self._saved)
                tty.setraw(fd)

    def restore(self) -> None:
        """Idempotent."""
        if self._saved is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._saved)
            self._saved = None
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None


class _Guard:
    """A shell that gives the terminal `fd` (lent) the settings `saved` when this process ends unawares.

    It has a process group of its own, so that what is sent to ours does not reach it.
    """

    def __init__(self, fd: int, saved: Settings) -> None:
        """:raises OSError: there is no shell, or no process to be had."""
        read_fd, self._write_fd = os.pipe()
        try:
            self._pid = os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", _GUARD_SCRIPT, _stty_text(saved)],
                {"PATH": os.environ.get("PATH", os.defpath)},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, fd, 1),  # first: it may be 0
                    (os.POSIX_SPAWN_DUP2, read_fd, 0),
                    (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
                ],
                setpgroup=0,
            )
        except OSError:
            os.close(self._write_fd)
            raise
        finally:
            os.close(read_fd)

    def dismiss(self) -> None:
        """Blocking, briefly. End it; the terminal stays as it is."""
        with contextlib.suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._write_fd)


def _stty_text(settings: Settings) -> str:
    """Return `settings` in the form of `stty -g`."""
    iflag, oflag, cflag, lflag, _, _, letters = settings
    codes = [letter if isinstance(letter, int) else letter[0] for letter in letters]
    return ":".join(f"{number:x}" for number in (iflag, oflag, cflag, lflag, *codes))
