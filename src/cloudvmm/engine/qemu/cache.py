"""What was found out once, kept on disk between starts. Losing it costs time, never truth.

One small JSON file per subject in the cache folder (`host/cache.py`). A file that cannot be read, written
or understood counts as absent, and so does one that another user than root or ourselves could have written:
what is in it decides what we run.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TypeVar

import msgspec

from cloudvmm.host.cache import cache_folder, make_cache_folder

T = TypeVar("T")

_MAX_BYTES = 1024 * 1024


class _Entry(msgspec.Struct):
    key: list[str]
    value: msgspec.Raw


def file_identity(path: str) -> list[str]:
    """Return what changes when the file at `path` does, as parts of a key.

    :raises OSError: there is no such file.
    """
    status = os.stat(path)
    return [path, str(status.st_dev), str(status.st_ino), str(status.st_size), str(status.st_mtime_ns)]


def load(subject: str, key: list[str], kind: type[T]) -> T | None:
    """Return what `store` kept for the same `subject` and `key`, or None."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        entry = msgspec.json.decode(_read(folder, f"{subject}.json"), type=_Entry)
        return msgspec.json.decode(entry.value, type=kind) if entry.key == key else None
    except (OSError, ValueError, RecursionError):  # msgspec's own errors are ValueErrors
        return None


def store(subject: str, key: list[str], value: object) -> None:
    """Keep `value` for `subject` until it is asked for with another key. Fails silently."""
    folder = cache_folder()
    if folder is None:
        return
    try:
        content = msgspec.json.encode(_Entry(key, msgspec.Raw(msgspec.json.encode(value))))
    except UnicodeEncodeError:
        return  # a path that is no UTF-8 has no form in JSON
    scratch = f"{folder}/.{subject}.{os.getpid()}"
    try:
        make_cache_folder(folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)  # of a process with our number that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(scratch, flags, 0o600), "wb") as file:
            file.write(content)
        os.replace(scratch, f"{folder}/{subject}.json")
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(scratch)


def _read(folder: str, name: str) -> bytes:
    """Return what the file `name` in `folder` holds.

    :raises OSError: it cannot be read, or somebody else may write it.
    """
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_ours(folder_fd)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(name, flags, dir_fd=folder_fd), "rb") as file:
            _check_ours(file.fileno())
            return file.read(_MAX_BYTES)
    finally:
        os.close(folder_fd)


def _check_ours(fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError
