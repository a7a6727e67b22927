"""vhost-user devices told by the number of their type, in a guest that runs."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, vm_config
from support.device.case import GUEST_S, find
from support.device.fs import SHARED_MEMORY
from support.shared import shared
from support.vhost_user import back_end
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

SIZE_BYTES = 4 * MIB
BLOCK, CONSOLE, RNG, I2C = 2, 3, 4, 34


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a back end that stays longer than the VM: QEMU 10.0 aborts when one of its kind goes."""
    path = tmp_path_factory.mktemp("bus") / "i2c.sock"
    with back_end(path):
        yield path


@shared()
def shared_vm(bus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    with booting(tmp_path_factory.mktemp("generic"), vm_config(**SHARED_MEMORY)) as booted:
        yield booted


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An image that a storage daemon serves at the socket beside it."""
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(SIZE_BYTES))
    argv = [
        "qemu-storage-daemon",
        *("--blockdev", f"driver=file,node-name=image,filename={image}"),
        "--export",
        f"type=vhost-user-blk,id=export,node-name=image,writable=on,num-queues=2"
        f",addr.type=unix,addr.path={tmp_path}/disk.sock",
    ]
    daemon = subprocess.Popen(argv)
    try:
        wait_until((tmp_path / "disk.sock").exists, "the storage daemon listens", timeout_s=GUEST_S)
        yield image
    finally:
        daemon.kill()
        daemon.wait()


def add(vm: Booted, **device: Any) -> Any:
    return vm.vmm.put("vm.add-generic-vhost-user", device, expect=200)


def test_storage_daemon_serves_a_disk_that_comes_and_goes(vm: Booted, disk: Path) -> None:
    for turn in (1, 2):
        content = disk.read_bytes()
        path = str(disk.with_suffix(".sock"))
        added = add(vm, socket=path, device_type=BLOCK, queue_sizes=[128, 128])
        name = find(vm, added["bdf"], "block")
        assert vm.run(f"sha256sum </dev/{name}").split()[0] == hashlib.sha256(content).hexdigest()
        assert vm.run(f"ls /sys/block/{name}/mq") == "0"  # one vCPU uses one of the two queues
        vm.run(f"echo turn {turn} | dd of=/dev/{name} bs=512 seek=3 conv=sync,fsync 2>/dev/null")
        assert disk.read_bytes()[1536:].startswith(b"turn %d\n" % turn)
        vm.vmm.put("vm.remove-device", {"id": added["id"]}, expect=204)
        vm.events.wait("vm/device-removed", count=turn, timeout_s=GUEST_S)
        assert vm.config()["generic_vhost_user"] == []


def test_device_of_a_type_that_cannot_be_removed_says_so(vm: Booted, bus: Path) -> None:
    added = add(vm, id="bus", socket=str(bus), device_type=I2C, queue_sizes=[4])
    assert vm.run(f"cat /sys/bus/pci/devices/{added['bdf']}/device") == hex(0x1040 + I2C)
    chain = vm.vmm.put("vm.remove-device", {"id": "bus"}, expect=500)
    assert chain[-1] == "Not allowed to remove this type of device from the VM: UNKNOWN"
    assert [device["id"] for device in vm.config()["generic_vhost_user"]] == ["bus"]


@pytest.mark.parametrize(
    ("device_type", "queue_sizes", "words"),
    [
        (CONSOLE, [64], "QEMU has no vhost-user device of type 3"),
        (RNG, [64, 64], "vhost-user-rng-pci cannot have 2 queues: it has 1"),
        (BLOCK, [64, 128], "All queues of vhost-user-blk-pci have one size"),
    ],
)
def test_device_that_qemu_cannot_make_is_refused(
    vm: Booted, tmp_path: Path, device_type: int, queue_sizes: list[int], words: str
) -> None:
    before = vm.config()
    device = {"socket": str(tmp_path / "none"), "device_type": device_type, "queue_sizes": queue_sizes}
    chain = vm.vmm.put("vm.add-generic-vhost-user", device, expect=500)
    assert chain[-2:] == ["Cannot create generic vhost-user device", words]
    assert vm.config() == before
