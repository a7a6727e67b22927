"""A snapshot in the making: written whole or not at all. `folder.py` reads what becomes of it.

All is first written into the folder `.cloudvmm-snapshot` inside the destination, and synced. Then the files
get their names one by one, `state.json` last: without it there is no snapshot. No file of others is ever
touched.

Who writes holds a lock on that folder for as long as the process lives. One without a lock was left behind
by a writer that was killed, and the next attempt clears it away, with what it had named already: the file
`naming` in it tells which inodes were about to get which names. All functions block on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from typing import Final

from cloudvmm.snapshot.error import DraftLeft, SnapshotFileError, SnapshotUnderWay
from cloudvmm.snapshot.folder import CONFIG_FILE, ENGINE_PREFIX, STATE_FILE, describe_file, named
from cloudvmm.snapshot.state import SavedFile, SavedState, encode_state

DRAFT_FOLDER: Final = ".cloudvmm-snapshot"
_NAMING_FILE: Final = "naming"
_ATTEMPTS: Final = 100
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Draft:
    """`folder` is where the engine's files go. `discard` it in the end, always."""

    def __init__(self, destination: str) -> None:
        """Make the folder, and clear away what a killed writer left.

        :raises SnapshotFileError: a file of a snapshot exists in `destination`, or none can be made there.
        """
        self._destination = destination
        self._published: list[str] = []
        self._is_whole = False
        self.folder = f"{destination}/{DRAFT_FOLDER}"
        with named(_creating(CONFIG_FILE)):
            self._fd = _take_folder(self.folder)
        try:
            with named(_creating(CONFIG_FILE)):
                _clear(destination, self.folder)
        except BaseException:
            os.close(self._fd)  # the folder stays: it tells what is still to be cleared away
            raise
        try:
            self._refuse_taken_names()
        except BaseException:
            self.discard()
            raise

    def publish(
        self,
        config: bytes,
        describe: Callable[[dict[str, SavedFile]], SavedState],
        before_names: Callable[[], None] = lambda: None,
    ) -> None:
        """Write `config.json` and, of what `describe` makes of the engine's files, `state.json`; name all.

        `before_names` is called when all is written; what it raises ends it.

        :raises SnapshotFileError: one cannot be written, or its name is taken meanwhile; then none is left.
        """
        names = sorted(os.listdir(self.folder))
        with named("Error reading the engine's snapshot files"):
            files = {name: describe_file(f"{self.folder}/{name}") for name in names}
        self._write(CONFIG_FILE, config)
        self._write(STATE_FILE, encode_state(describe(files)))
        names = [*names, CONFIG_FILE, STATE_FILE]
        with named(_creating(CONFIG_FILE)):
            inodes = {name: os.stat(f"{self.folder}/{name}").st_ino for name in names}
        self._write(_NAMING_FILE, "".join(f"{inode} {name}\n" for name, inode in inodes.items()).encode())
        before_names()
        for name in names:
            with named(_creating(name)):
                if name == STATE_FILE:  # it says that the others are there: so they must be, on the disk too
                    _sync(self.folder)
                    _sync(self._destination)
                _give_name(f"{self.folder}/{name}", f"{self._destination}/{name}")
                self._published.append(name)
        with named("Error writing the snapshot's folder"):
            _sync(self._destination)
        self._is_whole = True

    def discard(self) -> None:
        """Remove what is not a whole snapshot. Once is enough, more does no harm."""
        if self._fd < 0:
            return
        if not self._is_whole:
            for name in reversed(self._published):
                with contextlib.suppress(OSError):
                    os.unlink(f"{self._destination}/{name}")
        with contextlib.suppress(OSError):
            _empty(self.folder)
            os.rmdir(self.folder)
        os.close(self._fd)
        self._fd = -1

    def _refuse_taken_names(self) -> None:
        with named(_creating(CONFIG_FILE)):
            names = sorted(os.listdir(self._destination))
        for name in names:
            if name in (CONFIG_FILE, STATE_FILE) or name.startswith(ENGINE_PREFIX):
                raise SnapshotFileError(_creating(name)) from _system_error(errno.EEXIST)

    def _write(self, name: str, data: bytes) -> None:
        with named(_creating(name)):
            fd = os.open(f"{self.folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)


def _creating(name: str) -> str:
    if name.startswith(ENGINE_PREFIX):
        return f"Error creating the engine's snapshot file {name}"
    return f"Error creating VM {'state' if name == STATE_FILE else 'config'} snapshot file"


def _take_folder(path: str) -> int:
    """Return a descriptor of the folder at `path`, made where it is missing, that holds the lock on it.

    :raises SnapshotUnderWay: somebody who lives holds it.
    :raises DraftLeft: nobody can tell whether the writer that made it lives.
    """
    for _ in range(_ATTEMPTS):
        is_new = _make_folder(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its writer has just removed it
        try:
            _lock(fd, path, is_new=is_new)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise SnapshotUnderWay(path)


def _make_folder(path: str) -> bool:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return False
    return True


def _lock(fd: int, path: str, *, is_new: bool) -> None:
    if not is_new and os.fstat(fd).st_uid != os.geteuid():
        raise DraftLeft(path)  # what lies in there is not ours to believe
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SnapshotUnderWay(path) from None
    except OSError:  # a file system that cannot lock folders
        if not is_new:
            raise DraftLeft(path) from None


def _is_at(fd: int, path: str) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _clear(destination: str, folder: str) -> None:
    """Remove what a killed writer left: what is in `folder`, and what it named, unless that is whole."""
    inodes = _naming(f"{folder}/{_NAMING_FILE}")
    if _inode(f"{destination}/{STATE_FILE}") != inodes.get(STATE_FILE, -1):
        for name, inode in inodes.items():
            if _inode(f"{destination}/{name}") == inode:
                os.unlink(f"{destination}/{name}")
    _empty(folder)


def _naming(path: str) -> dict[str, int]:
    """Name to inode of the files that were about to be named; a line that was cut off is none."""
    try:
        with open(path, "rb") as file:
            lines = [line for line in file if line.endswith(b"\n")]
    except FileNotFoundError:
        return {}
    pairs = [os.fsdecode(line[:-1]).partition(" ") for line in lines]
    return {name: int(inode) for inode, _, name in pairs if inode.isdecimal() and "/" not in name}


def _inode(path: str) -> int | None:
    try:
        return os.lstat(path).st_ino
    except (FileNotFoundError, ValueError):
        return None


def _empty(folder: str) -> None:
    # What tells of the others is the last to go.
    for name in sorted(os.listdir(folder), key=lambda name: name == _NAMING_FILE):
        os.unlink(f"{folder}/{name}")


def _give_name(source: str, target: str) -> None:
    """Name a file without ever replacing another one."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):  # a file system without links; what comes this instant is lost
            raise _system_error(errno.EEXIST) from None
        os.rename(source, target)


def _sync(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
