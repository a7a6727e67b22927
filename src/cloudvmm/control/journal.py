"""The journal in the state folder: what was asked, when, and how it ended; one JSON line each.

The folder belongs to one VMM at a time (`lock`); `format` says which version wrote it, and a folder of
another version is refused. Without a state folder nothing is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

import msgspec

from cloudvmm.config import form
from cloudvmm.errors import error_chain, json_text
from cloudvmm.host.error import HostError
from cloudvmm.host.lock import LockConflict
from cloudvmm.host.own_folder import format_of, take_folder

FORMAT_VERSION = 1


class StateDirInUse(HostError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The state folder {path!r} is in use by another running VMM")


class StateDirFormat(HostError):
    def __init__(self, path: str, found: str) -> None:
        super().__init__(
            f"The state folder {path!r} has format {found!r}, this release writes {FORMAT_VERSION}; "
            "use another folder or the release that wrote it"
        )


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`errors` is the error chain of a command that failed; `at` is UTC seconds."""

    at: float
    command: str
    phase: str
    errors: list[str] | None = None


class Journal:
    """Appends entries; used by the control loop alone. An entry that cannot be written raises OSError."""

    def __init__(self, state_dir: str) -> None:
        """Take the folder, creating it (0700) where it is missing.

        :raises StateDirInUse: another VMM holds it.
        :raises StateDirFormat: a release that is not ours wrote it.
        :raises HostError: others may write there, or it cannot be locked.
        :raises OSError: it cannot be made or written.
        """
        self.state_dir = state_dir
        self._lock_fd = take_state_dir(state_dir)
        try:
            _check_format(state_dir)
            self.unfinished = _unfinished(self._path("journal"))
            _put_aside(self._path("journal"))
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._fd = os.open(self._path("journal"), flags, 0o600)
        except BaseException:
            os.close(self._lock_fd)
            raise

    def begin(self, command: str) -> None:
        self._write(Entry(at=time.time(), command=command, phase="begin"))

    def end(self, command: str, error: BaseException | None = None) -> None:
        phase = "done" if error is None else "failed"
        errors = None if error is None else [json_text(text) for text in error_chain(error)]
        self._write(Entry(at=time.time(), command=command, phase=phase, errors=errors))

    def settle(self, command: str, outcome: str) -> None:
        """Note what became of a command that the last VMM did not end."""
        self._write(Entry(at=time.time(), command=command, phase=outcome))

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._lock_fd)

    def _path(self, name: str) -> str:
        return f"{self.state_dir}/{name}"

    def _write(self, entry: Entry) -> None:
        line = msgspec.json.encode(entry) + b"\n"
        size = os.fstat(self._fd).st_size
        if os.write(self._fd, line) != len(line):
            os.ftruncate(self._fd, size)  # half a line would spoil the next one too
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def take_state_dir(state_dir: str) -> int:
    """As `take_folder`. :raises StateDirInUse: another VMM holds it."""
    try:
        return take_folder(state_dir)
    except LockConflict:
        raise StateDirInUse(state_dir) from None


def _check_format(state_dir: str) -> None:
    found = format_of(state_dir, str(FORMAT_VERSION))
    if found != str(FORMAT_VERSION):
        raise StateDirFormat(state_dir, found)


def _put_aside(path: str) -> None:
    """Keep the last VMM's journal beside the new one: neither grows for ever nor speaks for the other."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, path + ".old")


def _unfinished(path: str) -> list[str]:
    """Return the commands that the last VMM on this folder began and did not end."""
    open_commands: list[str] = []
    try:
        with open(path, "rb") as file:
            for line in file:
                try:
                    entry: Entry = form.decoder(Entry).decode(line)
                except form.MALFORMED:
                    continue  # the last line of a VMM that was killed while it wrote; or of a broken disk
                if entry.phase == "begin":
                    open_commands.append(entry.command)
                elif entry.command in open_commands:
                    open_commands.remove(entry.command)
    except FileNotFoundError:
        pass
    return open_commands
