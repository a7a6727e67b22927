"""What was found out once about a program, kept on disk between starts. Losing it costs time, never truth.

One small JSON file per subject in the cache folder (`host/cache.py`). A file that cannot be read, written
or understood counts as absent, and so does one that another user than root or ourselves could have written:
what is in it decides what we run. Whoever writes one removes those that serve nobody any more.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Final, TypeVar

import msgspec

from cloudvmm.config import form
from cloudvmm.host.cache import cache_folder, make_cache_folder

T = TypeVar("T")

MAX_KEPT: Final = 32  # of one topic: more programs than anybody has of a kind
_LONGEST_WRITE_S: Final = 3600
_MAX_BYTES = 1024 * 1024
_IDENTITY_PARTS: Final = 5


class Subject(msgspec.Struct, frozen=True):
    """What a topic is about: a program, which `name` stands for. What is known with another `key` is void."""

    topic: str
    name: str
    key: list[str]


class _Entry(msgspec.Struct):
    key: list[str]
    value: msgspec.Raw


def about_program(topic: str, path: str, *more: str) -> Subject:
    """Return the subject of what `topic` says of the program at `path` while that, and `more`, stay the same.

    :raises OSError: there is no such file.
    """
    name = f"{topic}-{zlib.crc32(os.fsencode(path)):08x}"
    return Subject(topic, name, [*more, *_identity(path)])


def load(subject: Subject, kind: type[T]) -> T | None:
    """Return what `store` kept for the same `subject`, or None."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        with _opened(folder) as folder_fd:
            entry = _read(folder_fd, f"{subject.name}.json")
        value: T | None = form.decoder(kind).decode(entry.value) if entry.key == subject.key else None
    except (OSError, ValueError, RecursionError):  # msgspec's own errors are ValueErrors
        return None
    return value


def store(subject: Subject, value: object) -> None:
    """Keep `value` for `subject`, and nothing of its topic that is of no use. Fails silently."""
    folder = cache_folder()
    if folder is None:
        return
    try:
        content = msgspec.json.encode(_Entry(subject.key, msgspec.Raw(msgspec.json.encode(value))))
    except UnicodeEncodeError:
        return  # a path that is no UTF-8 has no form in JSON
    scratch = f"{folder}/.{subject.name}.{os.getpid()}.{threading.get_ident()}"
    try:
        make_cache_folder(folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)  # of a process with our number that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(scratch, flags, 0o600), "wb") as file:
            file.write(content)
        os.replace(scratch, f"{folder}/{subject.name}.json")
        _prune(folder, subject.topic)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(scratch)


def _prune(folder: str, topic: str) -> None:
    """Remove what is known of programs that are gone or have changed, and the oldest beyond `MAX_KEPT`.

    What a process that was killed has written half goes, too.
    Another process may read or write there meanwhile: one that finds no file finds out by itself.

    :raises OSError: the folder cannot be read, or somebody else may write it.
    """
    with _opened(folder) as folder_fd:
        kept: list[tuple[int, str]] = []
        for name in os.listdir(folder_fd):
            if name.startswith(f"{topic}-") and name.endswith(".json"):
                if _is_of_use(folder_fd, name):
                    with contextlib.suppress(FileNotFoundError):
                        kept.append((os.stat(name, dir_fd=folder_fd).st_mtime_ns, name))
                else:
                    _remove(folder_fd, name)
            elif name.startswith(f".{topic}-") and _is_left(folder_fd, name):
                _remove(folder_fd, name)
        for _, name in sorted(kept, reverse=True)[MAX_KEPT:]:
            _remove(folder_fd, name)


def _is_of_use(folder_fd: int, name: str) -> bool:
    """Say whether somebody may yet ask for what the file says."""
    try:
        identity = _read(folder_fd, name).key[-_IDENTITY_PARTS:]
        return bool(identity) and _identity(identity[0]) == identity
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return False
    except OSError:
        return True  # perhaps it can be read or looked at again


def _is_left(folder_fd: int, name: str) -> bool:
    """Say whether nobody can be writing the file any more."""
    with contextlib.suppress(FileNotFoundError):
        return (
            os.stat(name, dir_fd=folder_fd, follow_symlinks=False).st_mtime < time.time() - _LONGEST_WRITE_S
        )
    return False


def _remove(folder_fd: int, name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder_fd)


def _identity(path: str) -> list[str]:
    """Return `path`, and what changes when the file there does."""
    status = os.stat(path)
    return [path, str(status.st_dev), str(status.st_ino), str(status.st_size), str(status.st_mtime_ns)]


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[int]:
    """Give a descriptor of `folder`.

    :raises OSError: it cannot be opened, or somebody else may write it.
    """
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_ours(folder_fd)
        yield folder_fd
    finally:
        os.close(folder_fd)


def _read(folder_fd: int, name: str) -> _Entry:
    """Return what the file `name` in a folder holds.

    :raises OSError: it cannot be read, or somebody else may write it. :raises ValueError: it is no entry.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=folder_fd), "rb") as file:
        _check_ours(file.fileno())
        entry: _Entry = form.decoder(_Entry).decode(file.read(_MAX_BYTES))
    return entry


def _check_ours(fd: int) -> None:
    status = os.fstat(fd)
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError
