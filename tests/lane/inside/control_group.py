"""Run inside the outer machine, whose kernel counts the processes of groups: is a machine's group limited?"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.engine.qemu.confinement import Policy, open_group

TOP = Path("/sys/fs/cgroup")
LEAST = "2"  # a shell, and one that it starts


@pytest.fixture
def groups() -> Iterator[Path]:
    """A group in whose groups processes are counted."""
    subprocess.run(["mount", "-t", "cgroup2", "cgroup2", TOP], check=True)
    try:
        (TOP / "cgroup.subtree_control").write_text("+pids")
        (TOP / "vms").mkdir()
        (TOP / "vms/cgroup.subtree_control").write_text("+pids")
        yield TOP / "vms"
        assert [each for each in (TOP / "vms").iterdir() if each.is_dir()] == []
        (TOP / "vms").rmdir()
    finally:
        subprocess.run(["umount", TOP], check=True)


def test_machine_has_so_many_processes_and_no_more(groups: Path) -> None:
    group = open_group(Policy(groups=str(groups)))
    assert group is not None
    with contextlib.closing(group):
        assert (Path(group.path) / "pids.max").read_text() == "4096\n"
        (Path(group.path) / "pids.max").write_text(LEAST)
        found = subprocess.run(
            ["sh", "-c", f"echo 0 >&{group.procs_fd}; cat /proc/self/cgroup; : $(:) | cat | cat"],
            pass_fds=[group.procs_fd],
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"/vms/{os.path.basename(group.path)}\n" in found.stdout
        assert "fork" in found.stderr
        assert found.returncode != 0
