"""Control groups (cgroup2) below a folder that was given to us, one for each machine's processes.

The kernel ends all that is in one at once, whoever's children they are. A group of processes that end with
us is locked for as long as it is in use, see `locked_folder.py`: so one whose user was killed can be
told from others. That of processes that outlive us has another name, told by a file that was written before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import time
from typing import Final

from cloudvmm.host.error import HostError
from cloudvmm.host.locked_folder import lock_folder, make_locked, new_path, open_folder
from cloudvmm.host.own_folder import replace_file
from cloudvmm.host.standard_fd import above_standard

PREFIX: Final = "cloudvmm-"
_KEPT_PREFIX: Final = f"{PREFIX}kept-"
_PASSING: Final = re.compile(rf"{PREFIX}[0-9a-f]{{12}}", re.ASCII)
_KEPT: Final = re.compile(rf"{_KEPT_PREFIX}[0-9a-f]{{12}}", re.ASCII)
_FILE: Final = "cgroup"
_END_S: Final = 5.0
_EVENTS_BYTES: Final = 256
_LONGEST_PATH: Final = 4096
_WAITER: Final = ("/bin/sh", "-c", "read -r _")


class GroupNotUsable(HostError):
    def __init__(self, path: str) -> None:
        super().__init__(f"Processes cannot be put into control groups below {path!r}")


class NoGroup(HostError):
    """It is no folder of control groups of version 2 (cgroup2)"""


class GroupWithoutKill(HostError):
    """The kernel cannot end a control group at once (Linux 5.14 can)"""


class ControlGroup:
    """Owns the group at `path`, and descriptors of it. A process that writes 0 to `procs_fd` is in it."""

    def __init__(self, parent: str, *, most_processes: int, state_dir: str | None = None) -> None:
        """Make it below `parent`, for that many processes and threads, as far as they can be counted there.

        With `state_dir`, a folder that is ours alone, it outlives us: see `adopt`.

        :raises OSError: it cannot be made.
        """
        self._file = None if state_dir is None else f"{state_dir}/{_FILE}"
        with contextlib.ExitStack() as undo:
            if state_dir is None:
                self.path, self._fd = make_locked(parent, PREFIX, is_there=_is_there)
            else:
                _make_way(state_dir)
                self.path, self._fd = _made_and_written(parent, f"{state_dir}/{_FILE}")
            undo.callback(self._remove)
            limit_processes(self._fd, most_processes)
            self.procs_fd = _open_procs(self._fd)
            undo.pop_all()

    @classmethod
    def adopt(cls, state_dir: str) -> ControlGroup | None:
        """Return the group that another process has made for what outlives it, None where there is none.

        :raises OSError: it cannot be had.
        """
        path = _read(f"{state_dir}/{_FILE}")
        if path is None:
            return None
        group = cls.__new__(cls)
        group.path, group._file = path, f"{state_dir}/{_FILE}"
        try:
            group._fd = open_folder(path)
        except FileNotFoundError:
            return None
        try:
            group.procs_fd = _open_procs(group._fd)
        except OSError:
            os.close(group._fd)
            raise
        return group

    def close(self) -> None:
        """Blocking, briefly. End all that is in it, and remove it. Idempotent."""
        if self._fd >= 0:
            self._close_procs()
            self._remove()
            self._fd = -1

    def leave(self) -> None:
        """Release the descriptors; the group stays as it is. Idempotent."""
        if self._fd >= 0:
            self._close_procs()
            os.close(self._fd)
            self._fd = -1

    def _close_procs(self) -> None:
        os.close(self.procs_fd)
        self.procs_fd = -1  # the next file that is opened is nobody's to write to

    def _remove(self) -> None:
        is_gone = _end(self.path, self._fd, time.monotonic() + _END_S)
        os.close(self._fd)
        if is_gone and self._file is not None:
            _unlink(self._file)


def check_parent(path: str) -> None:
    """Put a process into a group below `path`, for a trial.

    :raises GroupNotUsable: that cannot be done; the cause tells why.
    """
    try:
        _check_kind(path)
        with contextlib.closing(ControlGroup(path, most_processes=1)) as group:
            if not os.path.exists(f"{group.path}/cgroup.kill"):
                raise GroupWithoutKill
            _try(group.procs_fd)
    except (OSError, HostError) as error:
        raise GroupNotUsable(path) from error


def sweep_groups(parent: str) -> None:
    """Blocking, briefly. End and remove the groups below `parent` whose users were killed."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
        left: list[tuple[str, int]] = []
        for name in filter(_PASSING.fullmatch, os.listdir(parent)):
            with contextlib.suppress(OSError):  # it is in use, or gone
                fd = lock_folder(f"{parent}/{name}", is_there=_is_there)
                undo.callback(os.close, fd)
                left.append((f"{parent}/{name}", fd))
                _kill(fd)
        deadline_s = time.monotonic() + _END_S
        for path, fd in left:
            _end(path, fd, deadline_s)


def remove_group(state_dir: str) -> None:
    """Blocking, briefly. End and remove the group that the file in `state_dir` tells of, if there is one."""
    path = _read(f"{state_dir}/{_FILE}")
    if path is None:
        return
    try:
        fd = open_folder(path)
    except OSError:
        is_gone = not os.path.isdir(path)
    else:
        is_gone = _end(path, fd, time.monotonic() + _END_S)
        os.close(fd)
    if is_gone:
        _unlink(f"{state_dir}/{_FILE}")


def _make_way(state_dir: str) -> None:
    """As `remove_group`. :raises OSError: it is still there, and the file is all that tells of it."""
    remove_group(state_dir)
    left = _read(f"{state_dir}/{_FILE}")
    if left is not None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), left)


def parent_of_group(state_dir: str) -> str | None:
    """Return the folder below which is the group that the file in `state_dir` tells of, None without one."""
    path = _read(f"{state_dir}/{_FILE}")
    return None if path is None else os.path.dirname(path)


def limit_processes(folder_fd: int, most: int) -> None:
    """Let there be `most` processes and threads in the group, if somebody counts them there.

    :raises OSError: the kernel refuses.
    """
    if b"pids" in _content(folder_fd, "cgroup.controllers").split():
        _write(folder_fd, "pids.max", b"%d" % most)


def _check_kind(path: str) -> None:
    try:
        os.stat(f"{path}/cgroup.controllers")
    except FileNotFoundError:
        os.stat(path)
        raise NoGroup from None


def _made_and_written(parent: str, file: str) -> tuple[str, int]:
    path = new_path(parent, _KEPT_PREFIX)
    replace_file(file, os.fsencode(path))
    try:
        os.mkdir(path, 0o700)
        try:
            return path, open_folder(path)
        except OSError:
            os.rmdir(path)
            raise
    except OSError:
        _unlink(file)
        raise


def _is_there(folder_fd: int) -> bool:
    try:
        os.stat("cgroup.procs", dir_fd=folder_fd)
    except FileNotFoundError:
        return False
    return True


def _open_procs(folder_fd: int) -> int:
    """Return a descriptor which a child's standard input and output do not cover."""
    return above_standard(os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder_fd))


def _end(path: str, fd: int, deadline_s: float) -> bool:
    """Kill what is in the group and remove it; say whether it is gone."""
    with contextlib.suppress(OSError):
        os.rmdir(path)  # most often nothing is in it any more
    if os.path.isdir(path):
        with contextlib.suppress(OSError):
            _kill(fd)
            _wait_empty(fd, deadline_s)
            for folder, _, _ in os.walk(path, topdown=False):  # somebody may have made groups in it
                os.rmdir(folder)
    return not os.path.isdir(path)


def _kill(folder_fd: int) -> None:
    _write(folder_fd, "cgroup.kill", b"1")


def _wait_empty(folder_fd: int, deadline_s: float) -> None:
    events = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder_fd)
    try:
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        while b"populated 0" not in os.pread(events, _EVENTS_BYTES, 0).splitlines():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            poller.poll(left_s * 1000)
    finally:
        os.close(events)


def _try(procs_fd: int) -> None:
    """Put a process into the group, which ends soon. :raises OSError: the kernel refuses."""
    waits_fd, ends_fd = os.pipe2(os.O_CLOEXEC)
    with open(waits_fd, "rb"), open(ends_fd, "wb", buffering=0) as end:
        actions = [(os.POSIX_SPAWN_DUP2, waits_fd, 0)]
        pid = os.posix_spawn(_WAITER[0], _WAITER, {}, file_actions=actions)
        try:
            os.write(procs_fd, b"%d" % pid)
        finally:
            end.close()
            os.waitpid(pid, 0)


def _read(file: str) -> str | None:
    """Return the path in `file`, None where there is none that could be ours."""
    try:
        with open(file, "rb") as opened:
            path = os.fsdecode(opened.read(_LONGEST_PATH))
    except OSError:
        return None
    return path if os.path.isabs(path) and _KEPT.fullmatch(os.path.basename(path)) else None


def _content(folder_fd: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder_fd)
    with open(fd, "rb") as file:
        return file.read()


def _write(folder_fd: int, name: str, data: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder_fd)
    with open(fd, "wb", buffering=0) as file:
        file.write(data)


def _unlink(file: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(file)
