"""What was found out once, kept on disk between starts. Losing it costs time, never truth.

One small JSON file per subject in the cache folder (`host/cache.py`). A file that cannot be read, written or understood counts as absent.
"""

from __future__ import annotations

import contextlib
import os
from typing import TypeVar

import msgspec

from cloudvmm.host.cache import cache_folder, make_cache_folder

T = TypeVar("T")


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
        with open(f"{folder}/{subject}.json", "rb") as file:
            entry = msgspec.json.decode(file.read(), type=_Entry)
        return msgspec.json.decode(entry.value, type=kind) if entry.key == key else None
    except (OSError, msgspec.MsgspecError):
        return None


def store(subject: str, key: list[str], value: object) -> None:
    """Keep `value` for `subject` until it is asked for with another key. Fails silently."""
    folder = cache_folder()
    if folder is None:
        return
    entry = _Entry(key, msgspec.Raw(msgspec.json.encode(value)))
    scratch = f"{folder}/.{subject}.{os.getpid()}"
    try:
        make_cache_folder(folder)
        with open(scratch, "wb") as file:
            file.write(msgspec.json.encode(entry))
        os.replace(scratch, f"{folder}/{subject}.json")
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
