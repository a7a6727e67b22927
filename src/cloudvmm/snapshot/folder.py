"""A snapshot's folder: what lies in it, read with every doubt spoken out. `draft.py` writes it.

A snapshot is `config.json`, `state.json` and the engine's files `engine-*`. All functions block on the disk.
Who made the folder is not trusted: what is no plain file, or larger than any that is written, is refused.
"""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from collections.abc import Iterator
from typing import Final

from cloudvmm.snapshot.error import DamagedSnapshot, SnapshotFileError
from cloudvmm.snapshot.state import SavedFile

CONFIG_FILE: Final = "config.json"
STATE_FILE: Final = "state.json"
ENGINE_PREFIX: Final = "engine-"
# A config that came as 4 MiB of JSON is larger with all its defaults written out.
MAX_JSON_BYTES: Final = 16 << 20
# What is smaller is read once more for a checksum; of the rest, RAM above all, only the size is looked at.
MAX_CHECKSUM_BYTES: Final = 16 << 20
_CHUNK_BYTES: Final = 1 << 20
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def read_file(folder: str, name: str) -> bytes:
    """Return what `config.json` or `state.json` holds.

    :raises SnapshotFileError: it cannot be opened or read.
    :raises DamagedSnapshot: it is no plain file, or larger than any that is written.
    """
    what = "config" if name == CONFIG_FILE else "state"
    path = rust_quoted(f"{folder.rstrip('/')}/{name}")
    with named(f"Error opening VM {what} snapshot file {path}"):
        fd = os.open(f"{folder}/{name}", _READ)
    try:
        with named(f"Error reading VM {what} snapshot file {path}"):
            raw = os.read(fd, 0)  # a folder says here what it is
            _check_plain(fd, name)
            while chunk := os.read(fd, _CHUNK_BYTES):
                raw += chunk
                if len(raw) > MAX_JSON_BYTES:
                    raise DamagedSnapshot(f"{name} is larger than {MAX_JSON_BYTES} bytes")
            return raw
    finally:
        os.close(fd)


def check_files(folder: str, files: dict[str, SavedFile]) -> None:
    """Look whether the engine's files are what was written.

    :raises DamagedSnapshot: one is missing, or another.
    """
    for name, saved in files.items():
        if "/" in name or "\0" in name or not name.startswith(ENGINE_PREFIX):
            raise DamagedSnapshot(f"state.json names the file {name!r}")
        try:
            fd = os.open(f"{folder}/{name}", _READ)
        except (OSError, ValueError) as error:
            raise DamagedSnapshot(f"{name} cannot be read") from error
        try:
            _check_file(fd, name, saved)
        except OSError as error:
            raise DamagedSnapshot(f"{name} cannot be read") from error
        finally:
            os.close(fd)


def _check_file(fd: int, name: str, saved: SavedFile) -> None:
    _check_plain(fd, name)
    size_bytes = os.fstat(fd).st_size
    if size_bytes != saved.size_bytes:
        raise DamagedSnapshot(f"{name} has {size_bytes} bytes instead of {saved.size_bytes}")
    if saved.crc32 is not None and _crc32(fd) != saved.crc32:
        raise DamagedSnapshot(f"the checksum of {name} does not match")


def _check_plain(fd: int, name: str) -> None:
    """What is read from a FIFO or a device may never end."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise DamagedSnapshot(f"{name} is no plain file")


def rust_quoted(path: str) -> str:
    """Quote `path` as the reference prints one."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def describe_file(path: str) -> SavedFile:
    """:raises OSError: it cannot be read."""
    fd = os.open(path, _READ)
    try:
        size_bytes = os.fstat(fd).st_size
        return SavedFile(
            size_bytes=size_bytes, crc32=_crc32(fd) if size_bytes <= MAX_CHECKSUM_BYTES else None
        )
    finally:
        os.close(fd)


def _crc32(fd: int) -> int:
    crc32 = 0
    while chunk := os.read(fd, _CHUNK_BYTES):
        crc32 = zlib.crc32(chunk, crc32)
    return crc32


@contextlib.contextmanager
def named(text: str) -> Iterator[None]:
    """Turn what the system refuses into a `SnapshotFileError` with `text`."""
    try:
        yield
    except OSError as error:
        # The reference's chain gives the system's words alone.
        raise SnapshotFileError(text) from OSError(error.errno, error.strerror)
    except ValueError as error:
        raise SnapshotFileError(text) from error
