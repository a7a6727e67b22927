"""Whether the host has the huge pages that a guest is to stand on."""

from __future__ import annotations

import os

import msgspec
import pytest

from cloudvmm.engine.qemu import memory
from cloudvmm.engine.qemu.memory import (
    Ram,
    RamBacking,
    RamFileTaken,
    RamNotAvailable,
    TooFewHugepages,
    memory_parts,
    open_ram,
)

MIB = 1 << 20
COUNTS = ("free_hugepages", "resv_hugepages", "nr_overcommit_hugepages", "surplus_hugepages")


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host whose huge pages are of 4 KiB, so that a memfd of any kernel has them."""
    make = os.memfd_create
    monkeypatch.setattr(os, "memfd_create", lambda name, flags: make(name, flags & ~os.MFD_HUGETLB))
    monkeypatch.setattr(memory, "_HUGEPAGES_FOLDER", str(tmp_path))

    def set_counts(*counts: int) -> None:
        folder = tmp_path / "hugepages-4kB"
        folder.mkdir()
        for name, count in zip(COUNTS, counts, strict=True):
            (folder / name).write_text(f"{count}\n")

    return set_counts


def ram(size: int) -> Ram:
    return Ram(
        zone_id="mem0",
        size=size,
        mergeable=False,
        hugepages=True,
        hugepage_size=None,
        prefault=False,
        reserve=True,
        hotplug_size=0,
    )


@pytest.mark.parametrize("counts", [(255, 0, 0, 0), (300, 45, 0, 0), (200, 0, 60, 5), (0, 255, 255, 0)])
def test_guest_larger_than_what_the_host_has_is_refused(host, counts):
    host(*counts)
    before = os.listdir("/proc/self/fd")
    words = r"^Guest memory needs 256 huge pages of 4 KiB, and the host has \d+ to give$"
    with pytest.raises(TooFewHugepages, match=words):
        open_ram(ram(MIB))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("counts", [(256, 0, 0, 0), (300, 44, 0, 0), (200, 0, 60, 4)])
def test_guest_that_fits_is_given_its_memory(host, counts):
    host(*counts)
    fd = open_ram(ram(MIB))

    assert fd is not None
    os.close(fd)


def test_host_that_tells_no_counts_has_no_such_memory(host):
    with pytest.raises(RamNotAvailable):
        open_ram(ram(MIB))


@pytest.mark.parametrize(
    ("members", "is_shared"),
    [
        ({}, True),
        ({"mergeable": True}, True),  # the kernel does not merge huge pages
        ({"hugepages": False, "mergeable": True}, False),
        ({"hugepages": False}, True),
        ({"file": "/f"}, False),
        ({"file": "/f", "shared": True}, True),
        ({"file": "/f", "mergeable": True, "hugepages": False, "shared": True}, True),
    ],
)
def test_memory_is_shared_unless_it_is_merged_or_a_copy_of_a_file(members, is_shared):
    assert msgspec.structs.replace(ram(4096), **members).is_shared is is_shared


@pytest.mark.parametrize(
    ("members", "spares_files", "is_read_alone"),
    [
        ({"file": "/private"}, True, True),
        ({"file": "/private"}, False, False),  # QEMU before 8.2 would make the memory itself read-only
        ({"file": "/shared", "shared": True}, True, False),
        ({}, True, False),
    ],
)
def test_file_that_is_not_shared_is_mapped_for_reading_where_qemu_can(members, spares_files, is_read_alone):
    backing = RamBacking(device_id="z", ram=msgspec.structs.replace(ram(MIB), **members), fd=9)
    (backend,) = memory_parts(backing, vcpus=1, spares_files=spares_files).objects
    assert (backend.get("readonly"), backend.get("rom")) == ((True, "off") if is_read_alone else (None, None))


def test_file_that_is_the_memory_of_another_vm_is_left_alone(tmp_path):
    file = tmp_path / "ram"
    file.write_bytes(bytes(MIB))
    shared = msgspec.structs.replace(ram(MIB), hugepages=False, file=str(file), shared=True)
    fd = open_ram(shared)
    assert fd is not None
    os.pwrite(fd, b"what the guest wrote", 0)
    before = os.listdir("/proc/self/fd")

    with pytest.raises(RamFileTaken):
        open_ram(shared)

    assert os.listdir("/proc/self/fd") == before
    assert os.pread(fd, 8, 0) == b"what the"
    os.close(fd)
    again = open_ram(shared)
    assert again is not None
    assert os.pread(again, 8, 0) == bytes(8)
    os.close(again)
