"""A file that says which process it is of.

The child waits until the file is written before it becomes the program that it is to be, and ends where
nobody writes it: so there is no moment at which that program lives and cannot be found, whenever we are
killed. It has no right to the file, nor a descriptor of it: no program can say that it is another one.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

from cloudvmm.host.error import HostError
from cloudvmm.host.foreign import ForeignProcess, ProcessId, identify

# What a shell does that has `gate_fd` as its standard input, before it becomes the program of its arguments.
GATE: Final = 'read -r _ && exec "$@" < /dev/null'
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"
_LONGEST_BYTES: Final = 256


class StillAlive(HostError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The process that {path!r} tells of is still alive")


class PidFile:
    """For one child that is about to be started, whose shell goes through `GATE`.

    Owns `gate_fd` until `close`. The child is to inherit it as its standard input.
    """

    def __init__(self, path: str) -> None:
        """:raises OSError: it cannot be made. :raises StillAlive: it is that of another process."""
        self._path = path
        found = find_process(path)
        if found is not None:
            found.close()
            raise StillAlive(path)
        self._write(b"")
        self.gate_fd, self._opening_fd = os.pipe2(os.O_CLOEXEC)

    def tell(self, pid: int) -> None:
        """Write that the child is `pid`, and let it go on.

        :raises OSError: it has ended already, or the file cannot be written.
        """
        child = identify(pid)
        if child is None:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        self._write(b"%d %d %s\n" % (child.pid, child.started, _boot_id()))
        os.write(self._opening_fd, b"\n")

    def close(self) -> None:
        """A child that was not told of ends now. Idempotent."""
        if self.gate_fd >= 0:
            os.close(self.gate_fd)
            os.close(self._opening_fd)
            self.gate_fd = -1

    def _write(self, data: bytes) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb", buffering=0) as file:
            file.write(data)


def find_process(path: str) -> ForeignProcess | None:
    """Return the process behind the file `path`, None where there is none that lives."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            words = os.read(fd, _LONGEST_BYTES).split()
        finally:
            os.close(fd)
        pid, started, boot_id = words
        if boot_id != _boot_id():
            return None  # the numbers are from before the host was started
        return ForeignProcess.find(ProcessId(int(pid), int(started)))
    except (OSError, ValueError):
        return None


def remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _boot_id() -> bytes:
    with open(_BOOT_ID, "rb") as file:
        return file.read().strip()
