"""Programs that serve one device of one guest, and end with it: virtiofsd, swtpm, passt and such.

They get their end of a connection as an open descriptor, so that no path is left in any file system. They die
with their manager as QEMU does, or outlive it as QEMU does.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from cloudvmm.engine.base import DeviceError, EngineError, EngineTimeout, MachineGone
from cloudvmm.engine.qemu.adopted_process import AdoptedProcess
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.confinement import Confinement
from cloudvmm.engine.qemu.process import ChildProcess, ProcessSpec
from cloudvmm.host.foreign import ForeignProcess, ProcessId, identify
from cloudvmm.host.scratch import ScratchFolder

_END_S = 1.0
_HELPER = re.compile(r"helper-\d+\.pid", re.ASCII)
_VERSION_S = 5.0


class NoProgram(DeviceError):
    def __init__(self, name: str, *, package: str) -> None:
        super().__init__(f"There is no {name} on this host: install the package {package}")


class CompanionFailed(DeviceError):
    """A helper program ended at once; the text is its own words."""


def find_program(name: str, *, package: str, folders: Sequence[str] = ()) -> str:
    """Return the path of the program `name`, sought on the PATH and then in `folders`.

    :raises NoProgram: it is not there; the Debian `package` has it.
    """
    import shutil  # rare, and it imports much

    found = shutil.which(name)
    for folder in folders:
        found = found or shutil.which(name, path=folder)
    if found is None:
        raise NoProgram(name, package=package)
    return os.path.abspath(found)


def version_of(program: str, *, name: str, attempt: Attempt) -> str:
    """Blocking. Return what `program` says of its version; errors call it `name`.

    :raises DeviceError: it does not run, or does not end. :raises MachineGone: `attempt` was aborted.
    """
    try:
        process = ChildProcess(ProcessSpec([program, "--version"], name=name))
        try:
            with attempt.waiting(process):
                process.wait(timeout_s=_VERSION_S)
            attempt.check()
            return process.output()
        finally:
            process.close()
    except MachineGone:
        raise
    except EngineError as error:
        raise DeviceError(str(error)) from error.__cause__


class Companion:
    """Owns the process. An `Attempt` that `waiting` lends it to ends it when it is aborted."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        name: str,
        attempt: Attempt,
        fds: Sequence[int] = (),
        confinement: Confinement | None = None,
    ) -> None:
        """Start it. `argv[0]` is an absolute path; `fds` are lent and keep their numbers in the child.

        Without a `confinement` it is one that confines itself, and needs to be free for that. It outlives us
        where `attempt` has a folder for what does, and is in its control group.

        :raises DeviceError: it could not be started; the cause tells why.
        """
        self.name = name
        self.pid_file = None if attempt.state_dir is None else _pid_path(attempt.state_dir)
        confine = None if confinement is None else partial(confinement.enter, tuple(fds))
        group_fd = None if attempt.group is None else attempt.group.procs_fd
        try:
            self._process = ChildProcess(
                ProcessSpec(
                    argv, fds=fds, name=name, confine=confine, pid_file=self.pid_file, group_fd=group_fd
                )
            )
        except EngineError as error:
            raise DeviceError(str(error)) from error.__cause__

    @classmethod
    def adopt(cls, found: ForeignProcess, *, name: str, pid_file: str) -> Companion:
        """Return one that another process has started, which is gone; owns `found`.

        :raises EngineError: it cannot be had; `found` is then still the caller's.
        """
        companion = cls.__new__(cls)
        companion.name, companion.pid_file = name, pid_file
        companion._process = AdoptedProcess(found, name=name, pid_file=pid_file)
        return companion

    @property
    def process_id(self) -> ProcessId:
        """Who it is, as long as it lives."""
        return identify(self.pid) or ProcessId(self.pid, 0)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """What is readable from the moment it has ended, for polling alone."""
        return self._process.fileno()

    def kill(self) -> None:
        """End it at once. Any thread, any time."""
        self._process.kill()

    def has_ended(self) -> bool:
        """Say whether it has ended; if so nothing of it stays in the system. Never blocks."""
        return self._process.has_ended()

    def ending(self) -> str:
        """Return a sentence on how it ended, in its own words where it had some."""
        return self._process.ending()

    def check(self, *, timeout_s: float = 0.0) -> None:
        """:raises CompanionFailed: it has ended already, or does within `timeout_s`, for which this waits."""
        with contextlib.suppress(EngineTimeout):
            self._process.wait(timeout_s=timeout_s)
        if self._process.has_ended():
            raise CompanionFailed(self._process.ending())

    def close(self) -> None:
        """End it. Waits for its end, but no longer than a second: then a thread does. Idempotent."""
        self._process.kill()
        reaper = threading.Thread(target=self._reap, name="companion-end", daemon=True)
        reaper.start()
        reaper.join(_END_S)

    def _reap(self) -> None:
        with contextlib.suppress(EngineError):
            self._process.close()


def helper_files(state_dir: str) -> list[str]:
    """Return the files in `state_dir` that say which helpers there are."""
    with contextlib.suppress(OSError):
        return [f"{state_dir}/{name}" for name in os.listdir(state_dir) if _HELPER.fullmatch(name)]
    return []


def _pid_path(state_dir: str) -> str:
    return f"{state_dir}/helper-{time.monotonic_ns()}.pid"


class ServedBacking(Backing, kw_only=True):
    """`fd` is our end of the connection to who serves the device, -1 where there is none.

    `companion` is who, where it is ours.
    """

    fd: int = -1
    companion: Companion | None = None

    @property
    def fds(self) -> list[int]:
        return [] if self.fd < 0 else [self.fd]

    def move(self, find: Callable[[int], int]) -> None:
        self.fd = find(self.fd) if self.fd >= 0 else self.fd

    def close(self) -> None:
        """End the connection for QEMU too, which may be waiting for an answer that never comes."""
        if self.fd >= 0:
            with contextlib.suppress(OSError), socket.socket(fileno=self.fd) as connection:
                connection.shutdown(socket.SHUT_RDWR)
            self.fd = -1
        if self.companion is not None:
            self.companion.close()
            self.companion = None


def connected_pair() -> tuple[int, int]:
    """Return a listening UNIX socket and a connection to it that waits to be accepted; the caller owns both.

    For programs that take a listening socket. Its path is gone already.
    """
    with ScratchFolder() as folder, contextlib.ExitStack() as undo:
        listener = undo.enter_context(socket.socket(socket.AF_UNIX))
        near = undo.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(folder.socket_path)
        listener.listen(1)
        near.connect(folder.socket_path)
        undo.pop_all()
        return listener.detach(), near.detach()
