"""A snapshot's folder: written whole or not at all, and read back with every doubt spoken out.

A snapshot is `config.json`, `state.json` and the engine's files `engine-*`. All are first written into
a folder of their own inside the destination, synced, and then given their names one by one, `state.json`
last: without it there is no snapshot. No file that exists is ever touched. All functions block on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Final

from cloudvmm.snapshot.error import DamagedSnapshot, SnapshotFileError
from cloudvmm.snapshot.state import SavedFile, SavedState, encode_state

CONFIG_FILE: Final = "config.json"
STATE_FILE: Final = "state.json"
ENGINE_PREFIX: Final = "engine-"
MAX_JSON_BYTES: Final = 64 << 20
# What is smaller is read once more for a checksum; of the rest, RAM above all, only the size is looked at.
MAX_CHECKSUM_BYTES: Final = 16 << 20
_CHUNK_BYTES: Final = 1 << 20
_NO_LINKS: Final = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class Draft:
    """A snapshot in the making; `folder` is where the engine's files go. `discard` it in the end, always."""

    def __init__(self, destination: str) -> None:
        """Make the folder.

        :raises SnapshotFileError: a file of a snapshot exists in `destination`, or none can be made there.
        """
        self._destination = destination
        self._published: list[str] = []
        self._is_whole = False
        self.folder = f"{destination}/.cloudvmm-{os.getpid()}-{os.urandom(4).hex()}"
        with _named(_creating(CONFIG_FILE)):
            names = os.listdir(destination)
        for name in sorted(names):
            if name in (CONFIG_FILE, STATE_FILE) or name.startswith(ENGINE_PREFIX):
                raise SnapshotFileError(_creating(name)) from _system_error(errno.EEXIST)
        with _named(_creating(CONFIG_FILE)):
            os.mkdir(self.folder, 0o700)

    def publish(self, config: bytes, describe: Callable[[dict[str, SavedFile]], SavedState]) -> None:
        """Write `config.json` and, of what `describe` makes of the engine's files, `state.json`; name all.

        :raises SnapshotFileError: one cannot be written, or its name is taken meanwhile; then none is left.
        """
        names = sorted(os.listdir(self.folder))
        with _named("Error reading the engine's snapshot files"):
            files = {name: _describe(f"{self.folder}/{name}") for name in names}
        self._write(CONFIG_FILE, config)
        self._write(STATE_FILE, encode_state(describe(files)))
        for name in (*names, CONFIG_FILE, STATE_FILE):
            with _named(_creating(name)):
                _give_name(f"{self.folder}/{name}", f"{self._destination}/{name}")
                self._published.append(name)
        with _named("Error writing the snapshot's folder"):
            _sync(self._destination)
        self._is_whole = True

    def discard(self) -> None:
        """Remove what is not a whole snapshot."""
        if not self._is_whole:
            for name in reversed(self._published):
                with contextlib.suppress(OSError):
                    os.unlink(f"{self._destination}/{name}")
        with contextlib.suppress(OSError):
            for name in os.listdir(self.folder):
                os.unlink(f"{self.folder}/{name}")
            os.rmdir(self.folder)

    def _write(self, name: str, data: bytes) -> None:
        with _named(_creating(name)):
            fd = os.open(f"{self.folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)


def read_file(folder: str, name: str) -> bytes:
    """Return what `config.json` or `state.json` holds.

    :raises SnapshotFileError: it cannot be opened or read.
    :raises DamagedSnapshot: it is larger than any that is written.
    """
    what = "config" if name == CONFIG_FILE else "state"
    path = rust_quoted(f"{folder.rstrip('/')}/{name}")
    with _named(f"Error opening VM {what} snapshot file {path}"):
        fd = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with _named(f"Error reading VM {what} snapshot file {path}"):
            raw = bytearray()
            while chunk := os.read(fd, _CHUNK_BYTES):
                raw += chunk
                if len(raw) > MAX_JSON_BYTES:
                    raise DamagedSnapshot(f"{name} is larger than {MAX_JSON_BYTES} bytes")
            return bytes(raw)
    finally:
        os.close(fd)


def check_files(folder: str, files: dict[str, SavedFile]) -> None:
    """Look whether the engine's files are what was written.

    :raises DamagedSnapshot: one is missing, or another.
    """
    for name, saved in files.items():
        if "/" in name or not name.startswith(ENGINE_PREFIX):
            raise DamagedSnapshot(f"state.json names the file {name!r}")
        try:
            size_bytes = os.stat(f"{folder}/{name}").st_size
            if size_bytes != saved.size_bytes:
                raise DamagedSnapshot(f"{name} has {size_bytes} bytes instead of {saved.size_bytes}")
            if saved.crc32 is not None and _crc32(f"{folder}/{name}") != saved.crc32:
                raise DamagedSnapshot(f"the checksum of {name} does not match")
        except OSError as error:
            raise DamagedSnapshot(f"{name} cannot be read") from error


def rust_quoted(path: str) -> str:
    """Quote `path` as the reference prints one."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _describe(path: str) -> SavedFile:
    size_bytes = os.stat(path).st_size
    crc32 = _crc32(path) if size_bytes <= MAX_CHECKSUM_BYTES else None
    return SavedFile(size_bytes=size_bytes, crc32=crc32)


def _crc32(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        crc32 = 0
        while chunk := os.read(fd, _CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
        return crc32
    finally:
        os.close(fd)


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


def _creating(name: str) -> str:
    if name in (CONFIG_FILE, STATE_FILE):
        return f"Error creating VM {name.removesuffix('.json')} snapshot file"
    return f"Error creating the engine's snapshot file {name}"


def _system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@contextlib.contextmanager
def _named(text: str) -> Iterator[None]:
    """Turn what the system refuses into a `SnapshotFileError` with `text`."""
    try:
        yield
    except OSError as error:
        # The reference's chain gives the system's words alone.
        raise SnapshotFileError(text) from OSError(error.errno, error.strerror)
    except ValueError as error:
        raise SnapshotFileError(text) from error
