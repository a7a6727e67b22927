"""How much this process can still have: of memory, of the host and within its control groups; and of a disk.

Page cache counts as free, since the kernel gives it back. Swap does not: memory that is swapped is no quick
memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

_KIB: Final = 1024
_CACHE: Final = re.compile(rb"^(?:in)?active_file (\d+)$", re.MULTILINE)
_TOTAL_CACHE: Final = re.compile(rb"^total_(?:in)?active_file (\d+)$", re.MULTILINE)
# What limits, what is in use: of a version of the kernel's control groups.
_FILES: Final = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def free_memory(root: str = "", *, group: str | None = None) -> int | None:
    """Return how many bytes are left, None where nobody tells. `root` is where proc and sys are.

    `group` is the folder of another control group (cgroup2) that has to have them, too.
    """
    found = [*_of_host(f"{root}/proc/meminfo"), *_of_groups(root)]
    if group is not None:
        found += _of_group_and_above(group)
    return min(found) if found else None


def free_disk(at: str | int) -> int | None:
    """Return how many bytes we may write where `at`, a path or descriptor, is; None where nobody counts them.

    :raises OSError: there is no such place.
    """
    found = os.statvfs(at)
    blocks = found.f_bavail if os.geteuid() else found.f_bfree  # some are kept for root
    return blocks * found.f_frsize if found.f_blocks else None


def _of_host(path: str) -> Iterator[int]:
    found = re.search(rb"^MemAvailable:\s+(\d+) kB$", _read(path), re.MULTILINE)
    if found is not None:
        yield int(found[1]) * _KIB


def _of_groups(root: str) -> Iterator[int]:
    """Yield what each control group leaves that this process is in, up to the first."""
    for line in _read(f"{root}/proc/self/cgroup").decode(errors="replace").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = f"{root}/sys/fs/cgroup{'/memory' if controllers else ''}"
            while True:
                yield from _of_group(top + path.rstrip("/"))
                if path in ("/", ""):
                    break
                path = os.path.dirname(path)


def _of_group_and_above(folder: str) -> Iterator[int]:
    while os.path.exists(f"{folder}/cgroup.controllers"):
        yield from _of_group(folder)
        folder = os.path.dirname(folder)


def _of_group(folder: str) -> Iterator[int]:
    for limit_name, used_name in _FILES:
        limit, used = _read(f"{folder}/{limit_name}").strip(), _read(f"{folder}/{used_name}").strip()
        if limit.isdigit() and used.isdigit():
            yield max(0, int(limit) - int(used) + _cache_bytes(_read(f"{folder}/memory.stat")))


def _cache_bytes(statistics: bytes) -> int:
    """Those of the groups below are told apart in the older version alone."""
    totals = _TOTAL_CACHE.findall(statistics)
    return sum(map(int, totals or _CACHE.findall(statistics)))


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
