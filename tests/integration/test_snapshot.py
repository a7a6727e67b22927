"""A guest is saved and goes on from what was saved, seen from inside.

On the oldest QEMU one whole way is gone by default; zones and saving twice are long tests there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, direct_boot, make_image, serving, vm_config
from support.deadline import GUEST_S
from support.old_qemu import old_qemu_program
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

VERSIONS = pytest.mark.parametrize("version", ["path", "7.2"])
SAMPLED = pytest.mark.parametrize("version", ["path", pytest.param("7.2", marks=pytest.mark.long)])


def flags_of(version: str, folder: Path) -> tuple[str, ...]:
    return ("--qemu", str(old_qemu_program(folder))) if version == "7.2" else ()


def save(vm: Booted, folder: Path) -> str:
    folder.mkdir()
    vm.vmm.put("vm.pause")
    vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}"}, expect=204)
    return f"file://{folder}"


def restore(vm: Booted, url: str) -> None:
    vm.vmm.put("vm.restore", {"source_url": url}, expect=204)
    assert vm.info()["state"] == "Paused"
    vm.open_shell()
    vm.vmm.put("vm.resume")


@pytest.mark.parametrize(
    ("saver", "restorer"),
    [("path", "path"), ("7.2", "7.2"), ("7.2", "path")],
    ids=["same", "7.2", "7.2 on newer"],
)
def test_guest_goes_on_where_it_was_saved(tmp_path: Path, saver: str, restorer: str) -> None:
    """In another process, with its disk, what was added to it while it ran, and all that is in its memory."""
    disk, added = make_image(tmp_path / "disk", 4 * MIB), make_image(tmp_path / "added", 4 * MIB)
    config = vm_config(
        cpus={"boot_vcpus": 1, "max_vcpus": 3},
        disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}],
    )
    with booting(tmp_path / "first", config, *flags_of(saver, tmp_path)) as vm:
        vm.vmm.put("vm.add-disk", {"id": "added", "path": str(added), "image_type": "Raw"}, expect=200)
        vm.vmm.put("vm.resize", {"desired_vcpus": 2}, expect=204)
        wait_until(lambda: online(vm) == 2, "another vCPU", timeout_s=GUEST_S)
        vm.run("head -c 20m /dev/urandom >/tmp/filled; md5sum </tmp/filled >/tmp/sum")
        vm.run("echo before | dd of=/dev/vdb bs=512 conv=sync,fsync")
        tree = vm.info()["device_tree"]
        looked, before = time.monotonic(), uptime(vm)
        url = save(vm, tmp_path / "snapshot")
        ran_s = time.monotonic() - looked
    with serving(tmp_path / "second", *flags_of(restorer, tmp_path)) as vm:
        restored = time.monotonic()
        restore(vm, url)
        after = uptime(vm)
        ran_s += time.monotonic() - restored
        assert before < after < before + ran_s + 1, "the guest's clock ran while there was no guest"
        assert vm.run("md5sum </tmp/filled") == vm.run("cat /tmp/sum")
        assert sorted(vm.info()["device_tree"]) == sorted(tree)
        assert online(vm) == 2
        assert vm.run("head -c 6 /dev/vdb") == "before"
        vm.run("echo after | dd of=/dev/vdb bs=512 conv=sync,fsync")
        assert added.read_bytes()[:5] == b"after"
        vm.vmm.put("vm.remove-device", {"id": "added"}, expect=204)
        vm.events.wait("vm/device-removed", timeout_s=GUEST_S)
        vm.vmm.put("vm.reboot")
        vm.wait_ready()
        assert online(vm) == 2


def online(vm: Booted) -> int:
    switch = "/sys/devices/system/cpu/cpu1/online"
    return int(vm.run(f"[ ! -e {switch} ] || echo 1 >{switch}; nproc"))


def uptime(vm: Booted) -> float:
    return float(vm.run("cat /proc/uptime").split()[0])


def test_saved_guest_goes_on_as_well_and_one_state_serves_many(tmp_path: Path) -> None:
    with booting(tmp_path / "first", vm_config()) as vm:
        vm.run("echo kept >/tmp/kept")
        url = save(vm, tmp_path / "snapshot")
        vm.vmm.put("vm.resume")
        assert vm.run("cat /tmp/kept") == "kept"
        vm.run("echo changed >/tmp/kept")
        (*_, last) = _refused(vm, tmp_path / "snapshot")
        assert last
        vm.vmm.put("vm.shutdown")
        vm.vmm.put("vm.delete")
        for _ in range(2):
            restore(vm, url)
            assert vm.run("cat /tmp/kept") == "kept"
            vm.run("echo changed again >/tmp/kept")
            vm.vmm.put("vm.shutdown")
            vm.vmm.put("vm.delete")


def test_snapshot_is_called_off_while_qemu_stands_still(tmp_path: Path) -> None:
    config = vm_config(memory={"size": 256 * MIB, "mergeable": True})  # which goes through QEMU's stream
    folder, chains = tmp_path / "snapshot", []
    folder.mkdir()
    with booting(tmp_path / "run", config) as vm, vm.vmm.second() as other:
        vm.run("head -c 20m /dev/urandom >/tmp/filled; md5sum </tmp/filled >/tmp/sum")
        vm.vmm.put("vm.pause")
        body = {"destination_url": f"file://{folder}"}
        asking = threading.Thread(target=lambda: chains.append(other.put("vm.snapshot", body, expect=500)))
        with standing_still(vm.qemu_pid()):
            asking.start()
            wait_until(lambda: list(folder.iterdir()), "the snapshot is begun", timeout_s=GUEST_S)
            assert vm.vmm.get("vm.snapshot-progress")["phase"] == "Saving"
            vm.vmm.put("vm.cancel-snapshot", expect=204)
        asking.join(GUEST_S)
        assert [chain[-1] for chain in chains] == ["The snapshot was cancelled"]
        assert list(folder.iterdir()) == []
        assert vm.vmm.get("vm.snapshot-progress")["phase"] == "Cancelled"
        assert vm.info()["state"] == "Paused"
        vm.vmm.put("vm.snapshot", body, expect=204)
        told = vm.vmm.get("vm.snapshot-progress")
        assert (told["phase"], told["saved_bytes"]) == ("Finished", told["total_bytes"])
        vm.vmm.put("vm.resume")
        assert vm.run("md5sum </tmp/filled") == vm.run("cat /tmp/sum")
        vm.vmm.put("vm.delete")
        restore(vm, f"file://{folder}")
        assert vm.run("md5sum </tmp/filled") == vm.run("cat /tmp/sum")


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _refused(vm: Booted, folder: Path) -> list[str]:
    """Save where a snapshot is already."""
    vm.vmm.put("vm.pause")
    words: list[str] = vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}"}, expect=500)
    vm.vmm.put("vm.resume")
    return words


@SAMPLED
def test_memory_of_zones_and_of_virtio_mem_is_saved(tmp_path: Path, version: str) -> None:
    zones = [
        {"id": "a", "size": 192 * MIB, "hotplug_size": 256 * MIB},
        {"id": "b", "size": 128 * MIB, "mergeable": True},
    ]
    config = vm_config(
        memory={"size": 0, "hotplug_method": "VirtioMem", "zones": zones},
        payload=direct_boot("memhp_default_state=online_movable"),
    )
    with booting(tmp_path / "first", config, *flags_of(version, tmp_path)) as vm:
        vm.vmm.put("vm.resize-zone", {"id": "a", "desired_ram": 448 * MIB}, expect=204)
        wait_until(lambda: vm.info()["memory_actual_size"] == 576 * MIB, "memory", timeout_s=GUEST_S)
        vm.run("mkdir -p /tmp/m && mount -t tmpfs -o size=90% none /tmp/m")
        vm.run(
            "head -c 100m /dev/urandom >/tmp/m/filled && md5sum </tmp/m/filled >/tmp/sum", timeout_s=GUEST_S
        )
        url = save(vm, tmp_path / "snapshot")
        vm.vmm.put("vm.delete")
        restore(vm, url)
        assert vm.run("md5sum </tmp/m/filled", timeout_s=GUEST_S) == vm.run("cat /tmp/sum")
        assert vm.info()["memory_actual_size"] == 576 * MIB


def test_state_of_another_machine_is_refused(tmp_path: Path) -> None:
    with booting(tmp_path / "first", vm_config()) as vm:
        url = save(vm, tmp_path / "snapshot")
        vm.vmm.put("vm.delete")
        ram = tmp_path / "snapshot" / "engine-ram-0"
        ram.write_bytes(b"")
        vm.vmm.put("vm.restore", {"source_url": url}, expect=500)
        vm.vmm.get("vm.info", expect=404)
        vm.vmm.put("vm.create", vm_config())


def test_disks_of_a_snapshot_stay_as_they_are_whoever_goes_on(tmp_path: Path) -> None:
    """The VM itself and two that were restored write side by side, and none sees the others."""
    raw, limited, folder = make_image(tmp_path / "raw", 4 * MIB), tmp_path / "limited", tmp_path / "snapshot"
    make_image(limited, 4 * MIB)
    folder.mkdir()
    limit = {"bandwidth": {"size": 64 * MIB, "refill_time": 100}}
    disks = [
        {"id": "d", "path": str(raw), "image_type": "Raw"},
        {"id": "e/1", "path": str(limited), "image_type": "Raw", "rate_limiter_config": limit},
    ]
    with booting(tmp_path / "run", vm_config(disks=disks)) as vm:
        for name in ("vda", "vdb"):
            write(vm, name, "before")
        body = {"destination_url": f"file://{folder}", "overlay_directory": str(tmp_path)}
        vm.vmm.put("vm.pause")
        vm.vmm.put("vm.snapshot", body, expect=204)
        paths = [disk["path"] for disk in vm.config()["disks"]]
        assert paths == [f"{tmp_path}/disk0-0.qcow2", f"{tmp_path}/disk1-0.qcow2"]
        frozen = raw.read_bytes(), limited.read_bytes()
        vm.vmm.put("vm.resume")
        for name in ("vda", "vdb"):
            write(vm, name, "first")
        source = {"source_url": f"file://{folder}"}
        overlays = {**source, "overlay_directory": str(tmp_path)}
        with serving(tmp_path / "second") as second, serving(tmp_path / "third") as third:
            (*_, last) = second.vmm.put("vm.restore", source, expect=500)
            assert last.startswith(
                "The snapshot stands on images that must stay as they are, of the disks d, e/1"
            )
            for restored in (second, third):
                restored.vmm.put("vm.restore", overlays, expect=204)
                restored.open_shell()
                restored.vmm.put("vm.resume", expect=204)
                assert [read(restored, name) for name in ("vda", "vdb")] == ["before", "before"]
                write(restored, "vda", "other")
        assert [read(vm, name) for name in ("vda", "vdb")] == ["first", "first"]
        vm.vmm.put("vm.reboot", expect=204)
        vm.wait_ready()
        assert [read(vm, name) for name in ("vda", "vdb")] == ["first", "first"]
    assert (raw.read_bytes(), limited.read_bytes()) == frozen


def write(vm: Booted, name: str, word: str) -> None:
    vm.run(f"echo {word} | dd of=/dev/{name} bs=512 conv=sync,fsync")


def read(vm: Booted, name: str) -> str:
    vm.run("echo 3 >/proc/sys/vm/drop_caches")
    return vm.run(f"head -n 1 /dev/{name}")


@SAMPLED
def test_paused_guest_is_saved_twice_and_changes_meanwhile(tmp_path: Path, version: str) -> None:
    """QEMU gives the state of a guest that stands still once, and has the images inactive afterwards."""
    disk, added = make_image(tmp_path / "disk", 4 * MIB), make_image(tmp_path / "added", 4 * MIB)
    config = vm_config(disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}])
    with booting(tmp_path / "run", config, *flags_of(version, tmp_path)) as vm:
        save(vm, tmp_path / "one")
        save_again(vm, tmp_path / "two", expect=204)
        vm.vmm.put("vm.add-disk", {"id": "added", "path": str(added), "image_type": "Raw"}, expect=200)
        (*_, last) = save_again(vm, tmp_path / "three", expect=500)
        assert last.startswith("QEMU gives a state once: resume the VM")
        assert list((tmp_path / "three").iterdir()) == []
        answer = vm.vmm.exchange("PUT", "vm.resize-disk", {"id": "d", "desired_size": 8 * MIB})
        assert answer.status == (500 if version == "7.2" else 204)
        vm.vmm.put("vm.resume")
        vm.vmm.put("vm.resize-disk", {"id": "d", "desired_size": 16 * MIB}, expect=204)
        vm.run("echo after | dd of=/dev/vda bs=512 conv=sync,fsync")
        assert disk.read_bytes()[:5] == b"after"
        vm.run("until [ -b /dev/vdb ]; do usleep 20000; done")
        save(vm, tmp_path / "four")
        vm.vmm.put("vm.delete")
        restore(vm, f"file://{tmp_path / 'two'}")
        assert vm.run("ls /dev/vd*") == "/dev/vda"
        save(vm, tmp_path / "five")


def save_again(vm: Booted, folder: Path, *, expect: int) -> Any:
    folder.mkdir()
    return vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}"}, expect=expect)


def test_device_that_the_guest_still_has_keeps_it_from_being_saved(tmp_path: Path) -> None:
    """The configuration has it no more: nobody could go on from what was saved."""
    disk = make_image(tmp_path / "disk", 4 * MIB)
    config = vm_config(disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}])
    with booting(tmp_path / "run", config) as vm:
        vm.vmm.put("vm.pause")
        vm.vmm.put("vm.remove-device", {"id": "d"}, expect=204)
        (*_, last) = save_again(vm, tmp_path / "one", expect=500)
        assert last == "The guest still has to let go of what was removed: d"
        vm.vmm.put("vm.resume")
        vm.events.wait("vm/device-removed", timeout_s=GUEST_S)
        url = save(vm, tmp_path / "two")
        vm.vmm.put("vm.delete")
        restore(vm, url)
        assert vm.run("ls /dev/vd* 2>/dev/null || echo none") == "none"


@pytest.mark.root
def test_memory_of_huge_pages_is_saved(tmp_path: Path) -> None:
    config = vm_config(memory={"size": 128 * MIB, "hugepages": True, "hugepage_size": 2 * MIB})
    with huge_pages(64), booting(tmp_path / "run", config) as vm:
        vm.run("head -c 20m /dev/urandom >/tmp/filled; md5sum </tmp/filled >/tmp/sum")
        url = save(vm, tmp_path / "snapshot")
        vm.vmm.put("vm.delete")
        restore(vm, url)
        assert vm.run("md5sum </tmp/filled") == vm.run("cat /tmp/sum")


@contextlib.contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have the host reserve `count` pages of 2 MiB, beside those that it has."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    if not pool.exists():
        pytest.skip("The host does not tell of huge pages")
    before = int(pool.read_text())
    pool.write_text(str(before + count))
    try:
        if int(pool.read_text()) < before + count:
            pytest.skip(f"The host does not have {count} huge pages to give")
        yield
    finally:
        pool.write_text(str(before))


@pytest.mark.root
def test_full_disk_leaves_no_file_and_the_guest_goes_on(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", small], check=True)
    try:
        with booting(tmp_path / "run", vm_config()) as vm:
            vm.vmm.put("vm.pause")
            words = save_again(vm, small / "one", expect=500)
            assert any("No space left on device" in word for word in words)
            assert list((small / "one").iterdir()) == []
            save_again(vm, tmp_path / "two", expect=204)
            vm.vmm.put("vm.resume")
            assert vm.run("echo on") == "on"
    finally:
        subprocess.run(["umount", small], check=True)


def devices(folder: Path) -> dict[str, Any]:
    disk, shared = make_image(folder / "disk", 4 * MIB), make_image(folder / "shared", MIB)
    return {
        "ivshmem": {"ivshmem": {"path": str(shared), "size": MIB}},
        "vIOMMU": {"disks": [{"id": "d", "path": str(disk), "image_type": "Raw", "iommu": True}]},
        "private RAM": {"memory": {"size": 256 * MIB, "mergeable": True}},
        "small ones": {"watchdog": True, "pvpanic": True, "balloon": {"size": 32 * MIB}},
    }


@pytest.mark.parametrize("which", ["ivshmem", "vIOMMU", "private RAM", "small ones"])
def test_guest_with_devices_that_stay_goes_on(tmp_path: Path, which: str) -> None:
    """The matrix of devices takes those through this that come and go."""
    with booting(tmp_path / "run", vm_config(**devices(tmp_path)[which])) as vm:
        vm.run("head -c 20m /dev/urandom >/tmp/filled; md5sum </tmp/filled >/tmp/sum")
        before = vm.run("ls /sys/bus/pci/devices")
        url = save(vm, tmp_path / "snapshot")
        vm.vmm.put("vm.delete")
        restore(vm, url)
        assert vm.run("ls /sys/bus/pci/devices") == before
        assert vm.run("md5sum </tmp/filled") == vm.run("cat /tmp/sum")
        vm.run("[ ! -b /dev/vda ] || echo after | dd of=/dev/vda bs=512 conv=sync,fsync")
