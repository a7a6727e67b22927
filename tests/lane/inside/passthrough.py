"""Run inside the passthrough lane's machine: its devices are given to a guest, taken back, and given again.

One guest for all: it boots with an NVMe drive by VFIO and a vDPA disk. The tests build on each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lane.device import Host, VdpaDisk, add, bdf_of, check_drive, check_vdpa, remove
from lane.passthrough import NIC, NVME, SHARED
from support.booted import Booted, booting, serving, vm_config
from support.device.case import GUEST_S, pci_folder
from support.wait import wait_until

REFUSED = "The device could not be added to the VM"


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


@pytest.fixture(scope="module")
def vdpa_disks(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VdpaDisk]]:
    folder = tmp_path_factory.mktemp("vdpa")
    disks = [VdpaDisk(name, folder) for name in ("vd0", "vd1")]
    yield disks
    for disk in disks:
        disk.close()


@pytest.fixture(scope="module")
def vm(host: Host, vdpa_disks: list[VdpaDisk], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    host.give(NVME, "vfio-pci")
    folder = tmp_path_factory.mktemp("vm")
    config = vm_config(
        serial={"mode": "File", "file": str(folder / "kernel.log")},
        devices=[{"id": "drive", "path": pci_folder(NVME)}],
        vdpa=[{"id": "vd0", "path": vdpa_disks[0].path}],
    )
    with booting(folder / "run", config) as vm:
        yield vm


def test_vfio_device_is_there_from_the_boot_on(vm: Booted) -> None:
    check_drive(vm, "drive", mark="cold")
    node = vm.info()["device_tree"]["drive"]
    assert (node["children"], node["pci_bdf"]) == ([], bdf_of(vm, "drive"))
    assert any(each["PciBar"]["type_"] == "Mmio64" for each in node["resources"] if "PciBar" in each)


def test_vdpa_device_is_there_from_the_boot_on(vm: Booted, vdpa_disks: list[VdpaDisk]) -> None:
    check_vdpa(vm, vdpa_disks[0])
    vm.events.wait("vdpa/activated", timeout_s=GUEST_S)


def test_both_survive_a_reboot(vm: Booted, vdpa_disks: list[VdpaDisk]) -> None:
    vm.vmm.put("vm.reboot")
    vm.wait_ready()
    check_drive(vm, "drive", mark="rebooted")
    check_vdpa(vm, vdpa_disks[0])


def test_removed_vfio_device_is_the_hosts_again_with_what_the_guest_wrote(vm: Booted, host: Host) -> None:
    remove(vm, "drive")
    host.give(NVME, "nvme")
    (controller,) = wait_until(
        lambda: list(Path(pci_folder(NVME)).glob("nvme/nvme*")), "the host's drive", timeout_s=GUEST_S
    )
    drive = Path(f"/dev/{controller.name}n1")
    wait_until(drive.is_block_device, f"{drive} is there", timeout_s=GUEST_S)
    assert drive.read_bytes()[4096:].startswith(b"rebooted\n")


def test_vfio_device_is_added_again_under_its_id_and_while_paused(vm: Booted, host: Host) -> None:
    host.give(NVME, "vfio-pci")
    add(vm, "vm.add-device", {"id": "drive", "path": pci_folder(NVME)})
    check_drive(vm, "drive", mark="hot")
    remove(vm, "drive")
    vm.vmm.put("vm.pause")
    add(vm, "vm.add-device", {"id": "drive", "path": pci_folder(NVME), "x_exclude_mmap_bars": [0]})
    vm.vmm.put("vm.resume")
    check_drive(vm, "drive", mark="unmapped")


def test_second_vfio_device_shares_the_vm(vm: Booted, host: Host) -> None:
    host.give(NIC, "vfio-pci")
    add(vm, "vm.add-device", {"id": "nic", "path": pci_folder(NIC)})
    # The default guest has no driver for it, but can be asked what it is.
    folder = pci_folder(bdf_of(vm, "nic"))
    seen = vm.run(f"cat {folder}/vendor {folder}/device {folder}/class").split()
    assert seen == [Path(pci_folder(NIC), name).read_text().strip() for name in ("vendor", "device", "class")]
    check_drive(vm, "drive", mark="beside")


def test_vdpa_device_is_added_and_removed(vm: Booted, vdpa_disks: list[VdpaDisk]) -> None:
    disk = vdpa_disks[1]
    for _ in range(2):
        add(vm, "vm.add-vdpa", {"id": disk.name, "path": disk.path})
        check_vdpa(vm, disk)
        remove(vm, disk.name)
    told = [
        event["event"]
        for event in vm.events.documents()
        if event["source"] == "vdpa" and event["properties"]["id"] == disk.name
    ]
    assert told == ["activated", "reset"] * 2


@pytest.mark.parametrize(
    ("bdf", "chain"),
    [
        pytest.param(
            "0000:00:1e.0", ["There is no device /sys/bus/pci/devices/0000:00:1e.0"], id="no such device"
        ),
        pytest.param(
            SHARED,
            [f"Group is not viable: {SHARED[:-1]}2 must be bound to vfio-pci or to nothing"],
            id="group shared with the host",
        ),
        pytest.param(
            "0000:00:02.0",
            ["The device 0000:00:02.0 has the driver virtio-pci, and needs vfio-pci"],
            id="used by the host",
        ),
    ],
)
def test_refusal_says_why_and_leaves_all_as_it_was(
    vm: Booted, host: Host, bdf: str, chain: list[str]
) -> None:
    if bdf == SHARED:
        host.give(bdf, "vfio-pci")
    before = vm.info()
    answer = vm.vmm.put("vm.add-device", {"id": "other", "path": pci_folder(bdf)}, expect=500)
    words = [REFUSED, "Cannot create a VFIO device", *chain]
    assert [each for each in answer if each in words] == words
    assert vm.info() == before


def test_device_that_another_vm_has_is_refused(vm: Booted, tmp_path: Path) -> None:
    with serving(tmp_path / "other") as other:
        other.vmm.put("vm.create", vm_config(devices=[{"id": "drive", "path": pci_folder(NVME)}]))
        answer = other.vmm.put("vm.boot", expect=500)
        assert any("is used" in each or "busy" in each for each in answer), answer
    check_drive(vm, "drive", mark="kept")
