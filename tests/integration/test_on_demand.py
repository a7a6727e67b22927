"""VMs restored on demand stand on one snapshot: none of them changes it, each has what it wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, direct_boot, serving, vm_config
from support.deadline import GUEST_S
from support.wait import wait_until

pytestmark = pytest.mark.qemu

FILLED_MIB = 16


class Saved:
    """A snapshot of a guest that holds `/tmp/filled`, and `/tmp/sum` of it, in its memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"file://{folder}"
        self.ram = folder / "engine-ram-0"
        self.digests = self.look()

    def look(self) -> dict[str, str]:
        """Return a digest of each file."""
        return {path.name: digest(path) for path in sorted(self.folder.iterdir())}

    def restore(self, vm: Booted, *, mode: str = "OnDemand") -> None:
        vm.vmm.put("vm.restore", {"source_url": self.url, "memory_restore_mode": mode}, expect=204)
        vm.open_shell()
        vm.vmm.put("vm.resume", expect=204)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def save(vm: Booted, folder: Path) -> Saved:
    folder.mkdir()
    vm.vmm.put("vm.pause", expect=204)
    vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}"}, expect=204)
    return Saved(folder)


def is_whole(vm: Booted) -> bool:
    """Say whether the guest still has what it had when it was saved."""
    return vm.run("md5sum </tmp/filled") == vm.run("cat /tmp/sum")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Of a guest with memory of virtio-mem, too, and a balloon that reports free pages."""
    folder = tmp_path_factory.mktemp("on-demand")
    memory = {"size": 192 * MIB, "hotplug_method": "VirtioMem", "hotplug_size": 128 * MIB}
    balloon = {"size": 0, "free_page_reporting": True}
    config = vm_config(
        memory=memory, balloon=balloon, payload=direct_boot("memhp_default_state=online_movable")
    )
    with booting(folder / "run", config) as vm:
        vm.vmm.put("vm.resize", {"desired_ram": 320 * MIB}, expect=204)
        wait_until(lambda: actual_bytes(vm) == 320 * MIB, "memory", timeout_s=GUEST_S)
        vm.run(f"head -c {FILLED_MIB}m /dev/urandom >/tmp/filled; md5sum </tmp/filled >/tmp/sum")
        return save(vm, folder / "snapshot")


def actual_bytes(vm: Booted) -> int:
    size: int = vm.info()["memory_actual_size"]
    return size


def mappings(vm: Booted, path: Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the permissions and the sizes (KiB) of each mapping that QEMU has of `path`, by whatever name."""
    header, sizes, inode = "", {}, str(path.stat().st_ino)
    for line in Path(f"/proc/{vm.qemu_pid()}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if " " in name:
            if header.split()[4:5] == [inode]:
                yield header.split()[1], sizes
            header, sizes = line, {}
        elif rest.endswith(" kB"):
            sizes[name] = int(rest.split()[0])
    if header.split()[4:5] == [inode]:
        yield header.split()[1], sizes


def test_two_guests_share_the_snapshot_and_neither_changes_it(saved: Saved, tmp_path: Path) -> None:
    with serving(tmp_path / "first") as first, serving(tmp_path / "second") as second:
        saved.restore(first)
        saved.restore(second)
        first.run(f"head -c {FILLED_MIB}m /dev/zero >/tmp/filled")
        assert is_whole(second)
        ((permissions, sizes),) = mappings(second, saved.ram)
        assert permissions == "rw-p"
        assert sizes["Private_Dirty"] < sizes["Rss"] / 2
        assert sizes["Pss"] < sizes["Rss"] - sizes["Private_Dirty"] / 2
        assert sizes["Rss"] < sizes["Size"]
        first.vmm.put("vm.delete", expect=204)
        saved.restore(first)
        assert is_whole(first)
    assert saved.look() == saved.digests


def test_what_a_guest_gives_back_is_not_taken_from_the_others(saved: Saved, tmp_path: Path) -> None:
    """By its balloon, by the pages that it reports as free, and by virtio-mem."""
    with serving(tmp_path / "first") as first, serving(tmp_path / "second") as second:
        saved.restore(first)
        first.run("rm /tmp/filled; sync; echo 3 >/proc/sys/vm/drop_caches")
        first.vmm.put("vm.resize", {"desired_balloon": 176 * MIB}, expect=204)
        wait_until(lambda: actual_bytes(first) <= (320 - 176) * MIB, "the balloon", timeout_s=GUEST_S)
        first.vmm.put("vm.resize", {"desired_balloon": 0}, expect=204)
        wait_until(lambda: actual_bytes(first) == 320 * MIB, "no balloon", timeout_s=GUEST_S)
        first.vmm.put("vm.resize", {"desired_ram": 192 * MIB}, expect=204)
        wait_until(lambda: actual_bytes(first) == 192 * MIB, "less memory", timeout_s=GUEST_S)
        first.run(f"head -c {FILLED_MIB}m /dev/urandom >/tmp/filled; md5sum </tmp/filled >/tmp/sum")
        assert is_whole(first)
        assert saved.look() == saved.digests
        saved.restore(second)
        assert is_whole(second)
        first.vmm.put("vm.reboot", expect=204)
        first.wait_ready()
        assert list(mappings(first, saved.ram)) == []
    assert saved.look() == saved.digests


def test_guest_on_demand_is_saved_with_all_of_its_memory(saved: Saved, tmp_path: Path) -> None:
    with serving(tmp_path / "run") as vm:
        saved.restore(vm)
        vm.run("echo mine >/tmp/mine")
        again = save(vm, tmp_path / "again")
        vm.vmm.put("vm.resume", expect=204)
        assert is_whole(vm)
        vm.vmm.put("vm.delete", expect=204)
        words = refused(vm, again)
        assert words[-2] == "On-demand restore failed"
        assert words[-1].endswith("restore it with memory_restore_mode Copy")
        again.restore(vm, mode="Copy")
        assert is_whole(vm)
        assert vm.run("cat /tmp/mine") == "mine"
    assert saved.look() == saved.digests


def refused(vm: Booted, saved: Saved) -> list[str]:
    request = {"source_url": saved.url, "memory_restore_mode": "OnDemand"}
    words: list[str] = vm.vmm.put("vm.restore", request, expect=500)
    vm.vmm.get("vm.info", expect=404)
    return words


def test_device_whose_back_end_must_see_the_memory_is_refused(saved: Saved, tmp_path: Path) -> None:
    vsock: dict[str, Any] = {"cid": 3, "socket": str(tmp_path / "vsock")}
    with serving(tmp_path / "run") as vm:
        saved.restore(vm)
        (*_, last) = vm.vmm.put("vm.add-vsock", vsock, expect=500)
        assert last.startswith("The device needs shared memory")
        assert is_whole(vm)
        vm.vmm.put("vm.delete", expect=204)
        saved.restore(vm, mode="Copy")
        vm.vmm.put("vm.add-vsock", vsock, expect=200)
