"""The VM generation id, in a guest whose kernel has its driver: Debian's generic one, fetched on first use.

A guest that goes on where another stood notices, and takes fresh entropy at once: what it draws from then on
is not what another one draws from the same state. It is booted and saved by the oldest QEMU if there is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.guest import FAST_CMDLINE
from cloudvmm.guest.error import GuestBuildError
from lane.kernel import fetch_kernel, guest_on
from support.booted import Booted, booting, default_guest, serving, vm_config
from support.fork import CloneVm
from support.old_qemu import OLD_QEMU, old_qemu_program

pytestmark = [pytest.mark.qemu]

DRAW = "od -An -N32 -tx1 /dev/urandom; dmesg | grep -c 'crng reseeded due to virtual machine fork' || true"


class Look:
    """What a guest shows: its id, as `vm.info` has it, what it draws, and how often it took fresh entropy."""

    def __init__(self, vm: Booted | CloneVm) -> None:
        *drawn, reseeds = vm.run(DRAW).splitlines()
        self.vmgenid = vm.config()["platform"]["vmgenid"]
        self.drawn = "".join(drawn)
        self.reseeds = int(reseeds)


def assert_all_differ(looks: list[Look]) -> None:
    assert len({look.vmgenid for look in looks}) == len(looks)
    assert len({look.drawn for look in looks}) == len(looks)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Look]]:
    """A guest's snapshot, and what it showed before."""
    home = tmp_path_factory.mktemp("vmgenid")
    try:
        guest = guest_on(fetch_kernel(), default_guest(), home)
    except GuestBuildError as error:
        pytest.skip(f"The generic kernel cannot be had: {error}")
    payload = {"kernel": guest.kernel, "initramfs": guest.initramfs, "cmdline": FAST_CMDLINE}
    config = vm_config(payload=payload, platform={"vmgenid": "auto"})
    flags = ("--qemu", str(old_qemu_program(home))) if OLD_QEMU in os.environ else ()
    folder = home / "snapshot"
    folder.mkdir()
    with booting(home / "run", config, *flags) as vm:
        look = Look(vm)
        vm.vmm.put("vm.pause", expect=204)
        vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}"}, expect=204)
    yield folder, look


def restore(vm: Booted, folder: Path) -> Look:
    vm.vmm.put("vm.restore", {"source_url": f"file://{folder}", "resume": True}, expect=204)
    vm.open_shell()
    return Look(vm)


def fork_twice(vm: Booted, folder: Path) -> list[Look]:
    told = vm.vmm.put("vm.fork", {"directory": str(folder), "count": 2}, expect=200)
    clones = [CloneVm(each) for each in told["clones"]]
    looks = [Look(clone) for clone in clones]
    for clone in clones:
        clone.end()
    return looks


@pytest.mark.parametrize("is_old", [False, True], ids=["installed", "old"])
def test_each_that_goes_on_is_another_generation(
    saved: tuple[Path, Look], tmp_path: Path, is_old: bool
) -> None:
    folder, first = saved
    flags = ("--qemu", str(old_qemu_program(tmp_path))) if is_old else ()
    with serving(tmp_path / "run", *flags) as vm:
        one = restore(vm, folder)
        clones = [] if is_old else fork_twice(vm, tmp_path)
        after = Look(vm)
        vm.vmm.put("vm.delete", expect=204)
        two = restore(vm, folder)
    assert_all_differ([first, one, two, *clones])
    assert first.reseeds == 0
    assert (one.reseeds, two.reseeds) == (1, 1)
    assert [clone.reseeds for clone in clones] == [2] * len(clones)
    # The one that is forked is what it was.
    assert (after.vmgenid, after.reseeds) == (one.vmgenid, 1)
