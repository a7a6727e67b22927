"""Resizes by chance, one after the other, followed by the guest; then it is saved, and resized elsewhere."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest

from cloudvmm.client import Client
from cloudvmm.config.operation import VmResizeData, VmResizeZoneData
from support.accelerator import accelerator
from support.booted import MIB, Booted, booting, direct_boot, serving, vm_config
from support.deadline import GUEST_S
from support.wait import wait_until

pytestmark = pytest.mark.qemu

SEED = 5
MAX_VCPUS = 64  # an emulated machine can have as many in its life
MOST_VCPUS = 4
BOOT_MIB = {"near": 256, "far": 128}
ROOM_MIB = 256
STEP_MIB = 32


class Sizes(msgspec.Struct):
    """What was asked for, in vCPUs and MiB; `vcpus_had` are all that there were since the boot.

    Emulated guests that have let go of a vCPU cannot be saved: one that is to be saved `keeps_vcpus`.
    """

    vcpus: int = 1
    vcpus_had: int = 1
    keeps_vcpus: bool = False
    near: int = BOOT_MIB["near"]
    far: int = BOOT_MIB["far"]
    balloon: int = 0


class Series:
    """Asks for sizes by chance, and compares what `vm.info` and the guest have with what was asked."""

    def __init__(self, vm: Booted, chance: random.Random, sizes: Sizes) -> None:
        self.vm = vm
        self.chance = chance
        self.sizes = sizes
        self.base_kib: dict[str, int] = {}

    def measure(self) -> None:
        """Note what the guest has at the sizes of the boot."""
        self.base_kib = self.guest_kib()

    def step(self) -> None:
        sizes, chance = self.sizes, self.chance
        with Client(self.vm.server.socket_path) as client:
            match chance.choice(["vcpus", "near", "far", "balloon"]):
                case "vcpus":
                    least = sizes.vcpus if sizes.keeps_vcpus else 1
                    vcpus = chance.randint(least, max(least, MOST_VCPUS))
                    sizes.vcpus_had += max(0, vcpus - sizes.vcpus)
                    assert sizes.vcpus_had <= MAX_VCPUS, "another seed"
                    sizes.vcpus = vcpus
                    client.resize(VmResizeData(desired_vcpus=vcpus), GUEST_S)
                case "balloon":
                    sizes.balloon = self.another(sizes.balloon, 0, 64)
                    client.resize(VmResizeData(desired_balloon=sizes.balloon * MIB), GUEST_S)
                case zone:
                    size = self.another(getattr(sizes, zone), BOOT_MIB[zone], BOOT_MIB[zone] + ROOM_MIB)
                    setattr(sizes, zone, size)
                    client.resize_zone(VmResizeZoneData(id=zone, desired_ram=size * MIB), GUEST_S)
        self.compare()

    def another(self, now: int, least: int, most: int) -> int:
        return self.chance.choice([size for size in range(least, most + 1, STEP_MIB) if size != now])

    def compare(self) -> None:
        sizes, info = self.sizes, self.vm.info()
        config = info["config"]
        assert info["memory_actual_size"] == (sizes.near + sizes.far - sizes.balloon) * MIB, sizes
        assert (config["cpus"]["boot_vcpus"], config["balloon"]["size"]) == (sizes.vcpus, sizes.balloon * MIB)
        plugged = {zone["id"]: zone.get("hotplugged_size") or 0 for zone in config["memory"]["zones"]}
        assert plugged == {zone: (getattr(sizes, zone) - boot) * MIB for zone, boot in BOOT_MIB.items()}
        wait_until(lambda: self.guest_vcpus() == self.wanted_vcpus(), f"vCPUs of {sizes}", timeout_s=GUEST_S)
        wait_until(lambda: self.has_memory(), f"memory of {sizes}", timeout_s=GUEST_S)

    def wanted_vcpus(self) -> dict[str, int]:
        """vCPUs take turns between the two nodes."""
        far = self.sizes.vcpus // 2
        return {"all": self.sizes.vcpus, "near": self.sizes.vcpus - far, "far": far}

    def guest_vcpus(self) -> dict[str, int]:
        online = "for cpu in /sys/devices/system/cpu/cpu[1-9]*; do echo 1 >$cpu/online; done 2>/dev/null"
        counts = "for node in 0 1; do ls -d /sys/devices/system/node/node$node/cpu[0-9]* | wc -l; done"
        all_, near, far = map(int, self.vm.run(f"{online}; nproc; {counts} 2>/dev/null").split())
        return {"all": all_, "near": near, "far": far}

    def has_memory(self) -> bool:
        found, sizes = self.guest_kib(), self.sizes
        wanted = {
            zone: base + (getattr(sizes, zone) - BOOT_MIB[zone]) * 1024
            for zone, base in self.base_kib.items()
            if zone != "all"
        }
        if found["near"] + found["far"] != found["all"]:
            return False
        if sizes.balloon:  # it takes pages from where it likes
            return found["all"] == sum(wanted.values()) - sizes.balloon * 1024
        return all(found[zone] == kib for zone, kib in wanted.items())

    def guest_kib(self) -> dict[str, int]:
        nodes = "/sys/devices/system/node/node[01]/meminfo"
        text = self.vm.run(f"awk '/MemTotal/{{print $(NF-1)}}' /proc/meminfo {nodes}")
        all_, near, far = map(int, text.split())
        return {"all": all_, "near": near, "far": far}


def config() -> dict[str, object]:
    return vm_config(
        cpus={"boot_vcpus": 1, "max_vcpus": MAX_VCPUS},
        memory={
            "size": 0,
            "hotplug_method": "VirtioMem",
            "zones": [
                {"id": zone, "size": boot * MIB, "hotplug_size": ROOM_MIB * MIB}
                for zone, boot in BOOT_MIB.items()
            ],
        },
        numa=[
            {"guest_numa_id": 0, "cpus": list(range(0, MAX_VCPUS, 2)), "memory_zones": ["near"]},
            {"guest_numa_id": 1, "cpus": list(range(1, MAX_VCPUS, 2)), "memory_zones": ["far"]},
        ],
        balloon={"size": 0},
        payload=direct_boot("memhp_default_state=online_movable"),
    )


def test_guest_follows_resizes_by_chance_is_saved_and_resized_on(tmp_path: Path) -> None:
    follow_save_and_go_on(tmp_path, steps=5)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_guest_follows_50_resizes_by_chance_is_saved_and_resized_on(tmp_path: Path) -> None:
    follow_save_and_go_on(tmp_path, steps=50)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_guest_follows_50_resizes_by_chance_and_gives_vcpus_back(tmp_path: Path) -> None:
    with booting(tmp_path / "run", config()) as vm:
        series = Series(vm, random.Random(SEED), Sizes())
        series.measure()
        for _ in range(50):
            series.step()


def follow_save_and_go_on(folder: Path, *, steps: int) -> None:
    saved = folder / "snapshot"
    saved.mkdir()
    with booting(folder / "first", config()) as vm:
        series = Series(vm, random.Random(SEED), Sizes(keeps_vcpus=accelerator() == "tcg"))
        series.measure()
        for _ in range(steps):
            series.step()
        vm.vmm.put("vm.pause")
        vm.vmm.put("vm.snapshot", {"destination_url": f"file://{saved}"}, expect=204)
    with serving(folder / "second") as vm:
        vm.vmm.put("vm.restore", {"source_url": f"file://{saved}"}, expect=204)
        vm.open_shell()
        vm.vmm.put("vm.resume")
        series.vm = vm
        series.sizes.vcpus_had, series.sizes.keeps_vcpus = series.sizes.vcpus, False
        series.compare()
        for _ in range(max(3, steps // 5)):
            series.step()
