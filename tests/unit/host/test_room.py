"""How much memory is left, told from files as the kernel has them."""

from __future__ import annotations

import pytest

from cloudvmm.host.room import free_memory

MIB = 1024 * 1024
UNLIMITED = 9223372036854771712


@pytest.fixture
def root(tmp_path):
    """A host with 100 MiB left, which says nothing of control groups."""
    write(tmp_path, "proc/meminfo", "MemTotal: 204800 kB\nMemAvailable:   102400 kB\nSwapFree: 1 kB\n")
    return tmp_path


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(text))


def group(root, folder, limit_bytes, used_bytes, *, names=("memory.max", "memory.current"), statistics=""):
    write(root, f"sys/fs/cgroup/{folder}/{names[0]}", f"{limit_bytes}\n")
    write(root, f"sys/fs/cgroup/{folder}/{names[1]}", f"{used_bytes}\n")
    write(root, f"sys/fs/cgroup/{folder}/memory.stat", statistics)


def test_host_tells_what_it_has(root):
    assert free_memory(str(root)) == 100 * MIB


def test_host_that_tells_nothing_is_not_guessed_at(tmp_path):
    assert free_memory(str(tmp_path)) is None


def test_group_that_leaves_less_counts_with_its_cache_given_back(root):
    write(root, "proc/self/cgroup", "0::/a/b\n")
    group(root, "a/b", "max", 5)
    group(root, "a", 60 * MIB, 50 * MIB, statistics=f"anon 1\nactive_file {MIB}\ninactive_file {2 * MIB}\n")
    assert free_memory(str(root)) == 13 * MIB


def test_group_that_leaves_more_does_not(root):
    write(root, "proc/self/cgroup", "0::/a\n")
    group(root, "a", 600 * MIB, 50 * MIB)
    assert free_memory(str(root)) == 100 * MIB


def test_group_that_is_over_its_limit_leaves_nothing(root):
    write(root, "proc/self/cgroup", "0::/\n")
    group(root, "", 10 * MIB, 50 * MIB)
    assert free_memory(str(root)) == 0


def test_groups_of_the_older_version_count(root):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write(root, "proc/self/cgroup", "5:cpu:/c\n4:memory:/a\n0::/\n")
    statistics = f"active_file 7\ntotal_active_file {MIB}\ntotal_inactive_file {MIB}\n"
    group(root, "memory/a", 60 * MIB, 50 * MIB, names=names, statistics=statistics)
    group(root, "memory", UNLIMITED, 70 * MIB, names=names)
    group(root, "cpu/c", 1, 1, names=names)
    assert free_memory(str(root)) == 12 * MIB


def test_another_group_that_leaves_less_counts_and_those_above_it(root):
    for name in ("given", "given/vm"):
        write(root, f"groups/{name}/cgroup.controllers", "memory\n")
    write(root, "groups/given/memory.max", 30 * MIB)
    write(root, "groups/given/memory.current", 10 * MIB)
    assert free_memory(str(root), group=f"{root}/groups/given/vm") == 20 * MIB
    assert free_memory(str(root)) == 100 * MIB
