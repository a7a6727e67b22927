"""Control groups of this host (cgroup2), for tests that need real ones."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.deadline import HOST_S
from support.wait import wait_until


@contextlib.contextmanager
def group_folder() -> Iterator[Path]:
    """Make a group for others to make theirs in; skip the test where there is no cgroup2 that serves."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    tops = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    if not tops:
        pytest.skip("There is no cgroup2 mounted on this host")
    folder = tops[0] / f"cloudvmm-test-{os.urandom(6).hex()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"No control group can be made in {tops[0]}: {error.strerror}")
    if not (folder / "cgroup.kill").exists():
        folder.rmdir()
        pytest.skip("Linux before 5.14 cannot end a control group at once")
    try:
        yield folder
    finally:
        (folder / "cgroup.kill").write_text("1")
        for each, _, _ in os.walk(folder, topdown=False):
            group = Path(each)
            wait_until(lambda group=group: not members_of(group), "the group is empty", timeout_s=HOST_S)
            group.rmdir()


def groups_in(folder: Path) -> list[Path]:
    """Return the groups right below `folder`."""
    return sorted(each for each in folder.iterdir() if each.is_dir())


def members_of(group: Path) -> set[int]:
    """Return the processes that are in the group."""
    return set(map(int, (group / "cgroup.procs").read_text().split()))
