"""Another process, which is no child of ours: who it is, whether it lives, and what it has open.

A process is known by its pid and the time of its start, so that one that got the number later is never taken
for it. What it has open can be had from it, as the very same open file, by whoever may trace it: root, or the
same user where the kernel (Yama) does not say otherwise.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
from typing import Final

import msgspec

from cloudvmm.host.error import HostError
from cloudvmm.host.user import User

_PIDFD_GETFD: Final = 438  # the same number on every architecture
_STATE_AFTER_NAME: Final = 0
_START_AFTER_NAME: Final = 19
_PTRACE_SCOPE: Final = "/proc/sys/kernel/yama/ptrace_scope"
_CAP_SYS_PTRACE: Final = 1 << 19
_MARKS: Final = ("iff:", "tty-index:")


class NotTraceable(HostError):
    """This kernel lets nobody but root have what another process has open (kernel.yama.ptrace_scope)"""


class ProcessId(msgspec.Struct, frozen=True):
    """`started` is in clock ticks since the boot of the host, as the kernel has it."""

    pid: int
    started: int


class OpenFile(msgspec.Struct, frozen=True):
    """What tells one open file from others: `mark` is the interface of a TAP queue, or a PTY's number."""

    device: int
    inode: int
    mark: str = ""


def identify(pid: int) -> ProcessId | None:
    """Return who `pid` is now; None where nobody is, or a process that has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) <= _START_AFTER_NAME or fields[_STATE_AFTER_NAME] in (b"Z", b"X"):
        return None
    return ProcessId(pid, int(fields[_START_AFTER_NAME]))


def check_traceable() -> None:
    """:raises NotTraceable: another process of our user could not be asked for what it has open."""
    try:
        with open(_PTRACE_SCOPE, encoding="ascii") as file:
            scope = int(file.read())
    except (OSError, ValueError):
        return  # there is no such restriction
    if scope and not _has_right(_CAP_SYS_PTRACE):
        raise NotTraceable


class ForeignProcess:
    """Owns a pidfd, so that whoever has the number later is not met. `kill` may be called by any thread."""

    def __init__(self, process_id: ProcessId, pidfd: int) -> None:
        self.process_id = process_id
        self.pidfd = pidfd

    @classmethod
    def find(cls, process_id: ProcessId) -> ForeignProcess | None:
        """Return the process, if it still lives."""
        try:
            pidfd = os.pidfd_open(process_id.pid)
        except OSError:
            return None
        if identify(process_id.pid) != process_id:
            os.close(pidfd)
            return None
        return cls(process_id, pidfd)

    @property
    def pid(self) -> int:
        return self.process_id.pid

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait_end(self, timeout_s: float) -> bool:
        """Blocking. Say whether it has ended within `timeout_s`."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def user(self) -> User | None:
        """Return whose it is, None where it is ours or has ended."""
        try:
            with open(f"/proc/{self.pid}/status", "rb") as file:
                found = dict(line.split(b":", 1) for line in file.read().splitlines())
            uid, gid = (int(found[name].split()[1]) for name in (b"Uid", b"Gid"))
        except (OSError, KeyError):
            return None
        groups = tuple(map(int, found[b"Groups"].split()))
        return None if uid == os.geteuid() else User(uid, gid, groups)

    def descriptors(self) -> dict[int, OpenFile]:
        """Return what it has open, by its own numbers.

        :raises OSError: it has ended, or we may not look.
        """
        found = {}
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(OSError):  # closed under our eyes
                found[int(name)] = _open_file(str(self.pid), int(name))
        return found

    def take(self, number: int) -> int:
        """Return a descriptor of what it has open as `number`; the caller owns it.

        :raises OSError: there is no such, or we may not.
        """
        import ctypes  # rare, and 1.5 MiB: not at the top

        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.syscall(_PIDFD_GETFD, self.pidfd, number, 0))
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd

    def close(self) -> None:
        """Release the pidfd. Idempotent."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def open_file(fd: int) -> OpenFile:
    """Return what tells our own `fd` from others. :raises OSError: it is closed."""
    return _open_file("self", fd)


def _open_file(process: str, number: int) -> OpenFile:
    found = os.stat(f"/proc/{process}/fd/{number}")
    if not stat.S_ISCHR(found.st_mode):
        return OpenFile(found.st_dev, found.st_ino)
    return OpenFile(found.st_dev, found.st_ino, _mark(process, number))


def _mark(process: str, number: int) -> str:
    with open(f"/proc/{process}/fdinfo/{number}", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith(_MARKS):
                return line.strip()
    return ""


def _has_right(right: int) -> bool:
    with open("/proc/self/status", encoding="utf-8") as file:
        (line,) = (line for line in file if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) & right)
