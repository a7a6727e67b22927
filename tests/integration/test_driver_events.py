"""What the guest's drivers do to their devices, told as events while it happens in the guest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.booted import MIB, Booted, booting, make_image, vm_config
from support.deadline import GUEST_S
from support.namespace import network_namespace
from support.shared import shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

DEVICES = {"disk0", "net0", "__rng", "__console", "__balloon"}


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest with a device of each kind."""
    folder = tmp_path_factory.mktemp("drivers")
    config = vm_config(
        disks=[{"path": str(make_image(folder / "disk.raw", 8 * MIB)), "image_type": "Raw", "id": "disk0"}],
        net=[{"id": "net0"}],
        balloon={"size": 0},
    )
    with network_namespace(), booting(folder, config) as booted:
        yield booted


def seen(vm: Booted, device_id: str) -> list[str]:
    """Return what has happened to a device so far."""
    return [
        document["event"]
        for document in vm.events.documents()
        if document["source"] == "virtio-device" and document["properties"] == {"id": device_id}
    ]


def test_each_device_is_activated_once_behind_the_boot(vm: Booted) -> None:
    wait_until(lambda: all(seen(vm, device_id) for device_id in DEVICES), "every driver", timeout_s=GUEST_S)
    names = vm.events.names("vm", "virtio-device")
    assert names == ["vm/booting", "vm/booted", *["virtio-device/activated"] * len(DEVICES)]
    assert {device_id: seen(vm, device_id) for device_id in DEVICES} == {
        device_id: ["activated"] for device_id in DEVICES
    }


def test_driver_that_lets_go_and_comes_back_is_told(vm: Booted) -> None:
    wait_until(lambda: seen(vm, "disk0") == ["activated"], "the disk's driver", timeout_s=GUEST_S)
    device = vm.run("basename $(readlink -f /sys/block/vda/device)")
    vm.run(f"echo {device} > /sys/bus/virtio/drivers/virtio_blk/unbind")
    wait_until(lambda: seen(vm, "disk0") == ["activated", "reset"], "the disk's reset", timeout_s=GUEST_S)
    vm.run(f"echo {device} > /sys/bus/virtio/drivers/virtio_blk/bind")
    wait_until(
        lambda: seen(vm, "disk0") == ["activated", "reset", "activated"], "it comes back", timeout_s=GUEST_S
    )
    assert all(seen(vm, device_id) == ["activated"] for device_id in DEVICES - {"disk0"})


def test_pause_and_resume_change_nothing(vm: Booted) -> None:
    before = vm.events.names("virtio-device")
    vm.vmm.put("vm.pause")
    vm.vmm.put("vm.resume")
    assert vm.run("echo here") == "here"
    assert vm.events.names("virtio-device") == before


def test_reboot_activates_each_device_again(vm: Booted) -> None:
    before = {device_id: seen(vm, device_id) for device_id in DEVICES}
    vm.vmm.put("vm.reboot")
    vm.wait_ready()
    wait_until(
        lambda: all(len(seen(vm, one)) == len(before[one]) + 1 for one in DEVICES),
        "every driver",
        timeout_s=GUEST_S,
    )
    assert all(seen(vm, device_id) == [*before[device_id], "activated"] for device_id in DEVICES)
    names = vm.events.names("vm", "virtio-device")
    assert names[-len(DEVICES) - 1 :] == ["vm/rebooted", *["virtio-device/activated"] * len(DEVICES)]
