"""Sizes of a running VM that change, seen from inside the guest.

On the oldest QEMU zones grow and shrink by default; virtio-mem without zones is a long test there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.client import Client
from support.booted import MIB, Booted, booting, direct_boot, serving, vm_config
from support.deadline import GUEST_S
from support.old_qemu import old_qemu_program
from support.shared import shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

ONLINE = "for cpu in /sys/devices/system/cpu/cpu[1-9]*; do echo 1 >$cpu/online; done 2>/dev/null; nproc"


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """Its sizes were set before it was booted."""
    config = resizable()
    config |= {"cpus": config["cpus"] | {"boot_vcpus": 1}, "memory": config["memory"] | {"size": 128 * MIB}}
    with serving(tmp_path_factory.mktemp("resize")) as booted:
        booted.vmm.put("vm.create", config)
        sizes = {"desired_vcpus": 2, "desired_ram": 256 * MIB, "desired_balloon": 16 * MIB}
        booted.vmm.put("vm.resize", sizes, expect=204)
        booted.open_shell()
        booted.vmm.put("vm.boot")
        booted.wait_ready()
        yield booted


def resizable() -> dict[str, Any]:
    cpus = {
        "boot_vcpus": 2,
        "max_vcpus": 6,
        "topology": {"threads_per_core": 1, "cores_per_die": 3, "dies_per_package": 1, "packages": 2},
    }
    memory = {"size": 256 * MIB, "hotplug_size": 512 * MIB}
    return vm_config(cpus=cpus, memory=memory, balloon={"size": 0})


def resize(vm: Booted, vcpus: int) -> None:
    vm.vmm.put("vm.resize", {"desired_vcpus": vcpus}, expect=204)
    assert vm.config()["cpus"]["boot_vcpus"] == vcpus


def wait_vcpus(vm: Booted, vcpus: int) -> None:
    wait_until(lambda: vm.run(ONLINE) == str(vcpus), f"the guest has {vcpus} vCPUs", timeout_s=GUEST_S)


def wait_settled(vm: Booted, vcpus: int) -> None:
    """Wait until the guest has let go of all that it owes, and has `vcpus`."""
    wait_vcpus(vm, vcpus)
    same = {"desired_vcpus": vcpus}
    wait_until(
        lambda: vm.vmm.exchange("PUT", "vm.resize", same).status == 204, "nothing is owed", timeout_s=GUEST_S
    )


def test_sizes_that_were_set_before_the_boot_are_those_of_the_guest(vm: Booted) -> None:
    wait_vcpus(vm, 2)
    wait_until(lambda: vm.info()["memory_actual_size"] == 240 * MIB, "the balloon", timeout_s=GUEST_S)
    assert (vm.config()["cpus"]["boot_vcpus"], vm.config()["memory"]["size"]) == (2, 256 * MIB)
    vm.vmm.put("vm.resize", {"desired_balloon": 0}, expect=204)
    wait_until(lambda: vm.info()["memory_actual_size"] == 256 * MIB, "the balloon", timeout_s=GUEST_S)


def test_vcpus_come_and_go_and_keep_their_topology(vm: Booted) -> None:
    wait_vcpus(vm, 2)
    for vcpus in (4, 3, 5, 1):
        resize(vm, vcpus)
        wait_settled(vm, vcpus)
        folder = "/sys/devices/system/cpu/cpu[0-9]*/topology"
        found = vm.run(f"cat {folder}/physical_package_id {folder}/core_id").split()
        assert found[:vcpus] == [str(index // 3) for index in range(vcpus)]
        assert found[vcpus:] == [str(index % 3) for index in range(vcpus)]


def test_emulated_guest_that_has_lost_a_vcpu_is_not_saved(vm: Booted, tmp_path: Path) -> None:
    """Goes on where the test before it ended."""
    vm.vmm.put("vm.pause")
    (*_, last) = vm.vmm.put("vm.snapshot", {"destination_url": f"file://{tmp_path}"}, expect=500)
    assert last.startswith("An emulated guest that has let go of a vCPU cannot be saved")
    assert list(tmp_path.iterdir()) == []
    vm.vmm.put("vm.resume")


def test_emulation_says_when_it_can_have_no_other_vcpu(vm: Booted) -> None:
    """Goes on where those before it ended: QEMU would abort."""
    (*_, last) = vm.vmm.put("vm.resize", {"desired_vcpus": 2}, expect=500)
    assert last.startswith("The emulation has had 6 vCPUs since the boot")
    assert vm.config()["cpus"]["boot_vcpus"] == 1
    vm.vmm.put("vm.reboot")
    vm.wait_ready()
    wait_vcpus(vm, 1)


def test_vcpus_that_the_guest_owes_keep_others_from_changing(vm: Booted) -> None:
    """Goes on where the test before it ended: a guest of one vCPU, just rebooted."""
    resize(vm, 3)
    wait_vcpus(vm, 3)
    vm.vmm.put("vm.pause")
    resize(vm, 2)
    vm.vmm.put("vm.resize", {"desired_vcpus": 4}, expect=429)
    vm.vmm.put("vm.resume")
    wait_settled(vm, 2)
    assert vm.config()["cpus"]["boot_vcpus"] == 2


def test_balloon_takes_and_gives_back(vm: Booted) -> None:
    before = memory_kib(vm)
    vm.vmm.put("vm.resize", {"desired_balloon": 64 * MIB}, expect=204)
    wait_until(
        lambda: vm.info()["memory_actual_size"] == 192 * MIB, "the balloon has its share", timeout_s=GUEST_S
    )
    assert memory_kib(vm) <= before - 60 * 1024
    assert vm.config()["balloon"]["size"] == 64 * MIB
    vm.vmm.put("vm.resize", {"desired_balloon": 0}, expect=204)
    wait_until(lambda: vm.info()["memory_actual_size"] == 256 * MIB, "it is given back", timeout_s=GUEST_S)
    assert memory_kib(vm) > before - 4 * 1024


def memory_kib(vm: Booted) -> int:
    return int(vm.run("awk '/MemTotal/{print $2}' /proc/meminfo"))


def test_memory_modules_are_plugged_and_stay_after_a_reboot(vm: Booted) -> None:
    before = memory_kib(vm)
    vm.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks")
    vm.vmm.put("vm.resize", {"desired_ram": 384 * MIB}, expect=204)
    wait_memory(vm, before + 128 * 1024)
    vm.vmm.put("vm.resize", {"desired_ram": 640 * MIB}, expect=204)
    wait_memory(vm, before + 384 * 1024)
    vm.run("mkdir -p /tmp/m && mount -t tmpfs -o size=500m none /tmp/m")
    vm.run("head -c 400m /dev/zero >/tmp/m/filled")
    vm.run("umount /tmp/m")
    vm.vmm.put("vm.resize", {"desired_ram": 1024 * MIB}, expect=500)
    assert vm.config()["memory"]["size"] == 640 * MIB
    vm.vmm.put("vm.reboot")
    vm.wait_ready()
    assert memory_kib(vm) > before + 370 * 1024


def wait_memory(vm: Booted, kib: int) -> None:
    wait_until(lambda: memory_kib(vm) == kib, f"the guest has {kib} KiB", timeout_s=GUEST_S)


@pytest.mark.parametrize("version", ["path", "7.2"])
def test_guest_with_modules_is_saved_and_goes_on_elsewhere(tmp_path: Path, version: str) -> None:
    """Also where its RAM was made smaller since, which is for the next boot alone."""
    flags = ("--qemu", str(old_qemu_program(tmp_path))) if version == "7.2" else ()
    config = resizable() | {"payload": direct_boot("memhp_default_state=online_movable")}
    folder = tmp_path / "snapshot"
    folder.mkdir()
    with booting(tmp_path / "first", config, *flags) as vm:
        before = memory_kib(vm)
        for size in (384, 640, 128):
            vm.vmm.put("vm.resize", {"desired_ram": size * MIB}, expect=204)
        wait_memory(vm, before + 384 * 1024)
        vm.run("mkdir -p /tmp/m && mount -t tmpfs -o size=400m none /tmp/m")
        vm.run("head -c 1m /dev/urandom >/tmp/piece")
        vm.run("for i in $(seq 330); do cat /tmp/piece; echo $i; done >/tmp/m/filled")
        vm.run("md5sum </tmp/m/filled >/tmp/sum")
        vm.vmm.put("vm.pause")
        vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}"}, expect=204)
    with serving(tmp_path / "second", *flags) as vm:
        vm.vmm.put("vm.restore", {"source_url": f"file://{folder}"}, expect=204)
        vm.open_shell()
        vm.vmm.put("vm.resume")
        assert vm.run("md5sum </tmp/m/filled") == vm.run("cat /tmp/sum")
        assert memory_kib(vm) == before + 384 * 1024
        vm.vmm.put("vm.resize", {"desired_ram": 768 * MIB}, expect=204)
        wait_memory(vm, before + 512 * 1024)
        assert vm.config()["memory"]["size"] == 768 * MIB


def test_vcpus_are_bound_to_host_cpus(tmp_path: Path) -> None:
    cpus = {
        "boot_vcpus": 1,
        "max_vcpus": 2,
        "affinity": [{"vcpu": 0, "host_cpus": [1]}, {"vcpu": 1, "host_cpus": [0]}],
    }
    with booting(tmp_path, vm_config(cpus=cpus)) as vm:
        resize(vm, 2)
        wait_vcpus(vm, 2)
        assert vcpu_affinities(vm.qemu_pid()) == [{1}, {0}]
        assert [os.sched_getaffinity(thread) for thread in told_threads(vm)] == [{1}, {0}]


def told_threads(vm: Booted) -> list[int]:
    """Return the threads of the vCPUs that the event stream tells of."""
    found: dict[str, int] = {}
    with Client(vm.server.socket_path) as client, client.events(0) as events:
        while len(found) < 2:
            told = events.wait_for("vm", "vcpu-thread", GUEST_S).properties or {}
            assert told["process_id"] == str(vm.qemu_pid())
            found[told["id"]] = int(told["thread_id"])
    assert "vm/vcpu-thread" not in vm.events.names()
    return [found["0"], found["1"]]


def vcpu_affinities(pid: int) -> list[set[int]]:
    """Return the host CPUs of each thread of QEMU that runs a vCPU, in order."""
    tasks = Path(f"/proc/{pid}/task")
    found = {task.joinpath("comm").read_text(): int(task.name) for task in tasks.iterdir()}
    return [os.sched_getaffinity(found[name]) for name in sorted(found) if name.startswith("CPU ")]


def test_host_cpu_that_is_none_is_told(tmp_path: Path) -> None:
    cpus = {"boot_vcpus": 1, "max_vcpus": 1, "affinity": [{"vcpu": 0, "host_cpus": [999]}]}
    with serving(tmp_path) as vm:
        vm.vmm.put("vm.create", vm_config(cpus=cpus))
        words = vm.vmm.put("vm.boot", expect=500)
        assert "vCPU 0 could not be bound to its host CPUs" in words


def test_removal_of_a_vcpu_is_refused_by_an_old_qemu_that_would_crash(tmp_path: Path) -> None:
    with booting(tmp_path / "run", resizable(), "--qemu", str(old_qemu_program(tmp_path))) as vm:
        resize(vm, 3)
        wait_vcpus(vm, 3)
        (*_, last) = vm.vmm.put("vm.resize", {"desired_vcpus": 1}, expect=500)
        assert last.startswith("QEMU 7.2") and last.endswith("it needs KVM, or QEMU 10.0")
        assert vm.config()["cpus"]["boot_vcpus"] == 3


@pytest.mark.parametrize("version", ["path", pytest.param("7.2", marks=pytest.mark.long)])
def test_virtio_mem_gives_and_takes_memory(tmp_path: Path, version: str) -> None:
    memory = {"size": 256 * MIB, "hotplug_method": "VirtioMem", "hotplug_size": 1024 * MIB}
    payload = direct_boot("memhp_default_state=online_movable")
    flags = ("--qemu", str(old_qemu_program(tmp_path))) if version == "7.2" else ()
    with booting(tmp_path / "run", vm_config(memory=memory, payload=payload), *flags) as vm:
        before = memory_kib(vm)
        for plugged in (512, 1024, 64, 0):
            size = 256 * MIB + plugged * MIB
            vm.vmm.put("vm.resize", {"desired_ram": size}, expect=204)
            wait_until(
                lambda size=size: vm.info()["memory_actual_size"] == size, f"{size} bytes", timeout_s=GUEST_S
            )
            wait_memory(vm, before + plugged * 1024)
        assert vm.config()["memory"].get("hotplugged_size") is None
        vm.vmm.put("vm.resize", {"desired_ram": 384 * MIB}, expect=204)
        assert vm.config()["memory"]["hotplugged_size"] == 128 * MIB
        vm.vmm.put("vm.reboot")
        vm.wait_ready()
        wait_memory(vm, before + 128 * 1024)


@pytest.mark.parametrize("version", ["path", "7.2"])
def test_nodes_have_their_vcpus_memory_and_distances_and_zones_grow(tmp_path: Path, version: str) -> None:
    zones = [
        {"id": "near", "size": 256 * MIB, "hotplug_size": 512 * MIB},
        {"id": "far", "size": 128 * MIB, "prefault": True, "hotplug_size": 256 * MIB},
    ]
    numa = [
        {"guest_numa_id": 0, "cpus": [0], "memory_zones": ["near"]},
        {
            "guest_numa_id": 1,
            "cpus": [1, 2],
            "memory_zones": ["far"],
            "distances": [{"destination": 0, "distance": 15}],
        },
    ]
    config = vm_config(
        cpus={"boot_vcpus": 2, "max_vcpus": 3},
        memory={"size": 0, "hotplug_method": "VirtioMem", "zones": zones},
        numa=numa,
        payload=direct_boot("memhp_default_state=online_movable"),
    )
    flags = ("--qemu", str(old_qemu_program(tmp_path))) if version == "7.2" else ()
    with booting(tmp_path / "run", config, *flags) as vm:
        assert vm.run("cat /sys/devices/system/node/node[01]/distance") == "10 15\n15 10"
        assert vm.run("cat /sys/devices/system/node/node[01]/cpulist") == "0\n1"
        near, far = node_kib(vm, 0), node_kib(vm, 1)
        assert 200 * 1024 < near <= 256 * 1024
        assert 50 * 1024 < far <= 128 * 1024  # Linux sets 64 MiB aside as its SWIOTLB
        resize_zone(vm, "far", 384 * MIB)
        wait_node(vm, 1, far + 256 * 1024)
        resize_zone(vm, "near", 384 * MIB)
        wait_node(vm, 0, near + 128 * 1024)
        assert node_kib(vm, 1) == far + 256 * 1024
        resize_zone(vm, "far", 128 * MIB)
        wait_node(vm, 1, far)
        wait_until(lambda: vm.info()["memory_actual_size"] == 512 * MIB, "memory", timeout_s=GUEST_S)
        resize(vm, 3)
        wait_vcpus(vm, 3)
        assert vm.run("cat /sys/devices/system/node/node1/cpulist") == "1-2"
        assert [zone.get("hotplugged_size") for zone in vm.config()["memory"]["zones"]] == [128 * MIB, 0]


def resize_zone(vm: Booted, zone_id: str, size: int) -> None:
    vm.vmm.put("vm.resize-zone", {"id": zone_id, "desired_ram": size}, expect=204)


def node_kib(vm: Booted, node: int) -> int:
    return int(vm.run(f"awk '/MemTotal/{{print $4}}' /sys/devices/system/node/node{node}/meminfo"))


def wait_node(vm: Booted, node: int, kib: int) -> None:
    wait_until(lambda: node_kib(vm, node) == kib, f"node {node} has {kib} KiB", timeout_s=GUEST_S)


def test_zone_stands_on_its_file(tmp_path: Path) -> None:
    """Memory is in the file where it is shared, also after a reboot; else the file is left alone.

    Also by a guest that gives back what it has of it.
    """
    shared, private = tmp_path / "shared", tmp_path / "private"
    shared.write_bytes(b"")
    os.truncate(shared, 192 * MIB)
    contents = bytes(range(256)) * (64 * MIB // 256)
    private.write_bytes(contents)
    zones = [
        {"id": "s", "size": 192 * MIB, "file": str(shared), "shared": True},
        {"id": "p", "size": 64 * MIB, "file": str(private)},
    ]
    balloon = {"size": 0, "free_page_reporting": True}
    config = vm_config(memory={"size": 0, "zones": zones}, balloon=balloon)
    with booting(tmp_path / "run", config) as vm:
        assert shared.stat().st_blocks * 512 > 32 * MIB
        vm.vmm.put("vm.reboot")
        vm.wait_ready()
        assert shared.stat().st_blocks * 512 > 32 * MIB
        vm.vmm.put("vm.resize", {"desired_balloon": 128 * MIB}, expect=204)
        wait_until(lambda: vm.info()["memory_actual_size"] == 128 * MIB, "the balloon", timeout_s=GUEST_S)
        assert private.read_bytes() == contents


def test_zone_whose_file_cannot_be_had_is_told(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(MIB))
    with serving(tmp_path / "run") as vm:
        for file, words in ((short, "is shorter than"), (tmp_path / "none", "No such file or directory")):
            zone = {"id": "z", "size": 128 * MIB, "file": str(file)}
            vm.vmm.put("vm.create", vm_config(memory={"size": 0, "zones": [zone]}))
            assert any(words in word for word in vm.vmm.put("vm.boot", expect=500))
            vm.vmm.put("vm.delete")
