"""Entropy, balloon and places on the bus, seen from inside one guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, make_image, vm_config
from support.deadline import GUEST_S
from support.device.case import pci_folder
from support.shared import shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

RAM_BYTES = 256 * MIB
BALLOON_BYTES = 100 * MIB
TOUCHED_MIB = 120  # more than the balloon leaves
SLACK_MIB = 6
# What the balloon tells, and what that is in /proc/meminfo.
MEMORY_FIELDS = {
    "total_memory": "MemTotal",
    "free_memory": "MemFree",
    "available_memory": "MemAvailable",
    "disk_caches": "Cached+Buffers",
}
WORD = b"entropy of the host!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@shared()
def shared_vm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    source = folder / "entropy"
    source.write_bytes(WORD * (64 * 1024 // len(WORD)))
    balloon = {"size": BALLOON_BYTES, "id": "bal"}
    balloon |= {"deflate_on_oom": True, "free_page_reporting": True, "statistics": True}
    config = vm_config(
        memory={"size": RAM_BYTES},
        rng={"src": str(source), "pci_device_id": 25},
        balloon=balloon,
        platform={"num_pci_segments": 3},
        pci_segments=[{"pci_segment": 1, "mmio32_aperture_weight": 2}],
        disks=[
            disk(folder, "first", pci_segment=1),
            disk(folder, "second", pci_segment=2, pci_device_id=20),
        ],
    )
    with booting(tmp_path_factory.mktemp("run"), config) as booted:
        yield booted


def disk(folder: Path, name: str, **members: Any) -> dict[str, Any]:
    image = make_image(folder / f"{name}.raw", MIB)
    return {"id": name, "path": str(image), "image_type": "Raw", "serial": name, **members}


def bdf(vm: Booted, device_id: str) -> str:
    return str(vm.info()["device_tree"][f"_virtio-pci-{device_id}"]["pci_bdf"])


def serial_at(vm: Booted, address: str) -> str:
    glob = f"{pci_folder(address)}/virtio*/block/*/serial"
    return vm.run(f"until ls {glob} >/dev/null 2>&1; do usleep 20000; done; cat {glob}")


def actual_bytes(vm: Booted) -> int:
    return int(vm.info()["memory_actual_size"])


def shared_mib(vm: Booted) -> int:
    """Return how much of the guest's RAM the host holds."""
    status = Path(f"/proc/{vm.qemu_pid()}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssShmem:"))
    return int(line.split()[1]) // 1024


def test_guest_reads_the_source_that_was_named(vm: Booted) -> None:
    folder = pci_folder(bdf(vm, "__rng"))
    assert bdf(vm, "__rng") == "0000:00:19.0"
    assert vm.run(f"basename $(readlink {folder}/virtio*/driver)") == "virtio_rng"
    # The driver asks for some bytes before anybody reads: the first ones are not to be seen.
    read = bytes.fromhex(vm.run("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | hexdump -v -e '1/1 \"%02x\"'"))
    assert read in WORD * 10


@pytest.mark.parametrize(("name", "place"), [("first", None), ("second", "0000:00:14.0")])
def test_device_of_another_segment_is_where_vm_info_says(vm: Booted, name: str, place: str | None) -> None:
    assert bdf(vm, name) == (place or bdf(vm, name))
    assert bdf(vm, name).startswith("0000:00:")
    assert serial_at(vm, bdf(vm, name)) == name
    assert vm.run("ls /sys/bus/pci/devices | grep -v ^0000:00: || true") == ""


def test_added_device_has_the_slot_that_it_asked_for(vm: Booted, tmp_path: Path) -> None:
    added = vm.vmm.put("vm.add-disk", disk(tmp_path, "hot", pci_segment=2, pci_device_id=22), expect=200)
    assert added["bdf"] == "0000:00:16.0"
    assert serial_at(vm, added["bdf"]) == "hot"


def test_slot_that_is_taken_on_another_segment_is_refused(vm: Booted, tmp_path: Path) -> None:
    asked = disk(tmp_path, "late", pci_segment=1, pci_device_id=20)
    answer = vm.vmm.put("vm.add-disk", asked, expect=500)
    assert "already used: 20" in answer[-1]


def memory_told_mib(vm: Booted) -> dict[str, int]:
    told = vm.vmm.get("vm.counters").get("bal", {})
    return {name: told.get(name, 0) // MIB for name in MEMORY_FIELDS}


def memory_seen_mib(vm: Booted) -> dict[str, int]:
    table = dict(line.split(":") for line in vm.run("cat /proc/meminfo").splitlines())
    kib = {name: int(text.split()[0]) for name, text in table.items()}
    return {
        told: sum(kib[name] for name in names.split("+")) // 1024 for told, names in MEMORY_FIELDS.items()
    }


def wait_memory_told(vm: Booted) -> dict[str, int]:
    """Wait until the counters tell what the guest's own table has, but for what moves; return the latter."""

    def agreed() -> dict[str, int] | None:
        seen, told = memory_seen_mib(vm), memory_told_mib(vm)
        return seen if all(abs(seen[name] - told[name]) <= SLACK_MIB for name in seen) else None

    return wait_until(agreed, "the guest's own numbers in the counters", timeout_s=GUEST_S)


def test_counters_tell_what_the_guest_knows_of_its_memory(vm: Booted) -> None:
    before = wait_memory_told(vm)
    vm.run("mkdir -p /run/told && mount -t tmpfs -o size=60m none /run/told")
    vm.run("dd if=/dev/zero of=/run/told/full bs=1M count=40")
    filled = wait_memory_told(vm)
    assert filled["disk_caches"] >= before["disk_caches"] + 40 - SLACK_MIB
    assert filled["free_memory"] <= before["free_memory"] - 40 + SLACK_MIB
    assert vm.vmm.get("vm.counters")["bal"]["minor_faults"] > 0
    vm.run("umount /run/told")
    emptied = wait_memory_told(vm)
    assert emptied["disk_caches"] < filled["disk_caches"]


def test_guest_takes_from_the_balloon_before_it_runs_out(vm: Booted) -> None:
    wait_until(
        lambda: actual_bytes(vm) == RAM_BYTES - BALLOON_BYTES, "the balloon is filled", timeout_s=GUEST_S
    )
    vm.run("mount -t tmpfs -o size=200m tmpfs /mnt")
    vm.run(f"dd if=/dev/zero of=/mnt/touched bs=1M count={TOUCHED_MIB} 2>/dev/null")
    wait_until(
        lambda: actual_bytes(vm) > RAM_BYTES - BALLOON_BYTES, "the balloon has given", timeout_s=GUEST_S
    )
    assert vm.run("stat -c %s /mnt/touched") == str(TOUCHED_MIB * MIB)
    assert vm.run("dmesg | grep -i 'out of memory' || true") == ""


def test_host_gets_back_what_the_guest_freed(vm: Booted) -> None:
    vm.run(f"dd if=/dev/zero of=/mnt/touched bs=1M count={TOUCHED_MIB // 2} 2>/dev/null")
    before = shared_mib(vm)
    vm.run("rm /mnt/touched")
    wait_until(
        lambda: shared_mib(vm) < before - TOUCHED_MIB // 4,
        f"QEMU has less than {before} MiB of RAM",
        timeout_s=GUEST_S,
    )
