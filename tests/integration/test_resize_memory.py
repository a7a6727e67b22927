"""Memory that grows and shrinks under a guest that uses it, and guests that do not follow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.client import Client
from cloudvmm.config.operation import VmResizeData
from support.booted import MIB, Booted, booting, direct_boot, vm_config
from support.deadline import GUEST_S
from support.old_qemu import old_qemu_program
from support.shared import shared
from support.wait import wait_until

pytestmark = pytest.mark.qemu

SHORT_S = 3.0
ROUNDS = "/run/rounds"
# Writes files that differ, reads them back and compares; says "bad" where one is not what was written.
WORKLOAD = """
mkdir -p /run/work && mount -t tmpfs -o size=4g none /run/work
head -c 1m /dev/urandom >/run/work/seed
cat >/run/check <<'END'
while [ ! -e /run/stop ]; do
    for n in $(seq {files}); do (echo $n; cat /run/work/seed) >/run/work/$n; done
    for n in $(seq {files}); do
        (echo $n; cat /run/work/seed) | cmp -s - /run/work/$n || echo bad $n
    done
    echo round
done >{rounds}
END
rm -f /run/stop
sh /run/check </dev/null >/dev/null 2>&1 &
"""
PIECE_MIB = 16
PIECES_AT_ONCE = 8
PREPARE = "mkdir /run/sums; for n in $(seq {mib}); do cat /run/work/seed; done >/run/work/piece"
# Copies that differ in their first line, each with the sum that it is to have.
FILL = """
for n in {numbers}; do
    echo $n 1<>/run/work/piece
    md5sum </run/work/piece >/run/sums/$n
    cp /run/work/piece /run/work/full$n
done
"""
COMPARE = "for n in {numbers}; do md5sum </run/work/full$n | cmp - /run/sums/$n; done"
# Keeps most of its memory in use, and lets go of it by itself after a while: the shell must not be asked
# meanwhile, for a guest that is out of memory cannot start a program.
HOLD = """
mkdir -p /run/held && mount -t tmpfs -o size=400m none /run/held
dd if=/dev/urandom of=/run/held/kept bs=1M count=16; md5sum </run/held/kept >/run/sum
dd if=/dev/zero of=/run/held/full bs=1M count=244
mkfifo /run/never
(exec 3<>/run/never; read -t 20 word <&3; : >/run/held/full) </dev/null >/dev/null 2>&1 &
"""


def virtio_mem(boot_mib: int, room_mib: int) -> dict[str, object]:
    memory = {"size": boot_mib * MIB, "hotplug_method": "VirtioMem", "hotplug_size": room_mib * MIB}
    payload = direct_boot("memhp_default_state=online_movable")
    cpus = {"boot_vcpus": 1, "max_vcpus": 2}
    balloon = {"size": 0, "deflate_on_oom": True}
    return vm_config(memory=memory, payload=payload, cpus=cpus, balloon=balloon)


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    with booting(tmp_path_factory.mktemp("memory"), virtio_mem(256, 1024)) as booted:
        yield booted


@pytest.fixture
def client(vm: Booted) -> Iterator[Client]:
    with Client(vm.server.socket_path) as client:
        yield client


def actual_mib(vm: Booted) -> int:
    return int(vm.info()["memory_actual_size"]) // MIB


def rounds(vm: Booted) -> int:
    text = vm.run(f"cat {ROUNDS}")
    assert "bad" not in text
    return text.count("round")


def wait_round(vm: Booted) -> None:
    """Return when the guest has written and compared everything once more."""
    begun = rounds(vm) + 1
    wait_until(lambda: rounds(vm) > begun, "the guest compared all", timeout_s=GUEST_S)


def grow_and_shrink(vm: Booted, *, boot_mib: int, grown_mib: int, files: int) -> None:
    """Grow and shrink while the guest checks its memory; it has most of it in use when it is large."""
    vm.run(WORKLOAD.format(files=files, rounds=ROUNDS))
    with Client(vm.server.socket_path) as client:
        client.resize(VmResizeData(desired_ram=grown_mib * MIB), GUEST_S)
        wait_round(vm)
        vm.run(PREPARE.format(mib=PIECE_MIB))
        pieces = (grown_mib - boot_mib) * 3 // 4 // PIECE_MIB
        for script in (FILL, COMPARE):
            for first in range(0, pieces, PIECES_AT_ONCE):
                numbers = range(first, min(first + PIECES_AT_ONCE, pieces))
                assert vm.run(script.format(numbers=" ".join(map(str, numbers)))) == ""
        vm.run("rm /run/work/full*")
        client.resize(VmResizeData(desired_ram=boot_mib * MIB), GUEST_S * 2)
    wait_round(vm)
    vm.run("touch /run/stop; until umount /run/work; do usleep 100000; done 2>/dev/null")
    assert actual_mib(vm) == boot_mib


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_memory_grows_to_4_gib_and_back_under_a_guest_that_checks_it(tmp_path: Path) -> None:
    with booting(tmp_path / "run", virtio_mem(512, 3584)) as booted:
        grow_and_shrink(booted, boot_mib=512, grown_mib=4096, files=60)


def test_guest_without_the_drivers_keeps_what_it_has_until_it_gets_them(vm: Booted, client: Client) -> None:
    vm.run("rmmod virtio_mem && rmmod virtio_balloon")
    sizes = VmResizeData(desired_ram=384 * MIB, desired_balloon=32 * MIB)
    with pytest.raises(TimeoutError) as caught:
        client.resize(sizes, SHORT_S)
    ram = "it has 268435456 bytes of RAM, and was asked for 402653184"
    balloon = "it has 0 bytes in its balloon, and was asked for 33554432"
    assert str(caught.value).endswith(f"after 3 s: {ram}, {balloon}; it has done nothing")
    config = vm.config()
    assert (config["memory"]["hotplugged_size"], config["balloon"]["size"]) == (128 * MIB, 32 * MIB)
    assert actual_mib(vm) == 256

    vm.run("modprobe virtio_mem && modprobe virtio_balloon")
    wait_until(lambda: actual_mib(vm) == 352, "the guest to follow", timeout_s=GUEST_S)
    client.resize(VmResizeData(desired_ram=256 * MIB, desired_balloon=0), GUEST_S)


def test_paused_guest_is_told_and_follows_when_it_is_resumed(vm: Booted, client: Client) -> None:
    client.vm_pause()
    with pytest.raises(TimeoutError, match="2 vCPUs; the VM is paused$|asked for 2; the VM is paused$"):
        client.resize(VmResizeData(desired_vcpus=2), 0.5)
    client.vm_resume()
    client.resize(VmResizeData(desired_vcpus=2), GUEST_S)
    wait_until(lambda: vm.run("cat /sys/devices/system/cpu/present") == "0-1", "a vCPU", timeout_s=GUEST_S)


def test_balloon_gives_back_what_the_guest_needs(vm: Booted, client: Client) -> None:
    client.resize(VmResizeData(desired_balloon=96 * MIB), GUEST_S)
    assert actual_mib(vm) == 160
    vm.run("mkdir -p /run/need && mount -t tmpfs -o size=200m none /run/need")
    vm.run("dd if=/dev/zero of=/run/need/full bs=1M count=100")
    wait_until(lambda: actual_mib(vm) > 160, "the balloon has given", timeout_s=GUEST_S)
    assert vm.run("dmesg | grep -i 'out of memory' || true") == ""
    assert vm.config()["balloon"]["size"] == 96 * MIB
    vm.run("umount /run/need")
    client.resize(VmResizeData(desired_balloon=0), GUEST_S)
    assert actual_mib(vm) == 256


def test_memory_grows_and_shrinks_under_a_guest_that_checks_it(vm: Booted) -> None:
    grow_and_shrink(vm, boot_mib=256, grown_mib=512, files=10)


@pytest.mark.long
def test_guest_that_has_its_memory_in_use_keeps_it_until_it_can_let_go(vm: Booted, client: Client) -> None:
    client.resize(VmResizeData(desired_ram=480 * MIB), GUEST_S)
    vm.run(HOLD)
    with pytest.raises(TimeoutError, match=r"bytes of RAM, and was asked for 285212672; "):
        client.resize(VmResizeData(desired_ram=272 * MIB), SHORT_S)
    assert vm.config()["memory"]["hotplugged_size"] == 16 * MIB
    assert actual_mib(vm) > 272

    wait_until(lambda: actual_mib(vm) == 272, "the guest to let go", timeout_s=GUEST_S * 2)
    assert vm.run("md5sum </run/held/kept") == vm.run("cat /run/sum")
    vm.run("umount /run/held")
    client.resize(VmResizeData(desired_ram=256 * MIB), GUEST_S)
    assert actual_mib(vm) == 256


@pytest.mark.long
@pytest.mark.parametrize(("word", "tells"), [("quiet", True), ("module_blacklist=virtio_balloon", False)])
@pytest.mark.parametrize("version", ["path", "7.2"])
def test_guest_tells_of_its_memory_where_it_has_a_driver(
    tmp_path: Path, version: str, word: str, tells: bool
) -> None:
    flags = ("--qemu", str(old_qemu_program(tmp_path))) if version == "7.2" else ()
    config = vm_config(payload=direct_boot(word), balloon={"size": 0, "statistics": True})
    with booting(tmp_path / "run", config, *flags) as vm:
        if tells:
            told = wait_until(
                lambda: vm.vmm.get("vm.counters").get("__balloon"), "its numbers", timeout_s=GUEST_S
            )
            total_kib = int(vm.run("awk '/MemTotal/{print $2}' /proc/meminfo"))
            assert told["total_memory"] == total_kib * 1024
        else:
            vm.run("sleep 3")  # it is asked once a second of its own time
            assert "__balloon" not in vm.vmm.get("vm.counters")
