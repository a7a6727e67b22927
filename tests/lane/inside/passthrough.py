"""Run inside the passthrough lane's machine: its devices are given to a guest, taken back, and given again.

One guest for all: it boots with an NVMe drive by VFIO and a vDPA disk. The tests build on each other.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lane.passthrough import NIC, NVME, SHARED
from support.booted import MIB, Booted, booting, serving, vm_config
from support.device.case import GUEST_S, find, pci_folder
from support.wait import wait_until

WORDS = "from the drive"
DRIVERS = ("vfio_pci", "vfio_iommu_type1", "vduse", "vhost_vdpa", "ahci")
REFUSED = "The device could not be added to the VM"


class Host:
    """The outer machine's devices, as its administrator handles them."""

    def driver_of(self, bdf: str) -> str | None:
        link = Path(pci_folder(bdf), "driver")
        return link.resolve().name if link.exists() else None

    def give(self, bdf: str, driver: str) -> None:
        """Have `driver` take the function in the place of what has it."""
        folder = Path(pci_folder(bdf))
        folder.joinpath("driver_override").write_text(f"{driver}\n")
        if self.driver_of(bdf) is not None:
            folder.joinpath("driver/unbind").write_text(bdf)
        Path("/sys/bus/pci/drivers_probe").write_text(bdf)
        wait_until(lambda: self.driver_of(bdf) == driver, f"{bdf} has {driver}", timeout_s=GUEST_S)


class VdpaDisk:
    """A file that a process of ours serves as the vDPA device `name`; `path` is what a guest is given."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.image = folder / f"{name}.raw"
        self.image.write_bytes(name.encode().ljust(4 * MIB, b"\0"))
        self._server = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--blockdev", f"driver=file,node-name=file,filename={self.image}"),
                *("--export", f"type=vduse-blk,id=out,node-name=file,name={name},writable=on,num-queues=1"),
            ]
        )
        wait_until(Path(f"/dev/vduse/{name}").exists, f"{name} is served", timeout_s=GUEST_S)
        subprocess.run(["vdpa", "dev", "add", "name", name, "mgmtdev", "vduse"], check=True, timeout=30)
        self.path = wait_until(self._node, f"{name} has a node", timeout_s=GUEST_S)

    def _node(self) -> str | None:
        found = list(Path(f"/sys/bus/vdpa/devices/{self.name}").glob("vhost-vdpa-*"))
        return f"/dev/{found[0].name}" if found and Path("/dev", found[0].name).exists() else None

    def close(self) -> None:
        subprocess.run(["vdpa", "dev", "del", self.name], check=True, timeout=30)
        self._server.terminate()
        self._server.wait(30)


@pytest.fixture(scope="module")
def host() -> Host:
    subprocess.run(["modprobe", "-a", *DRIVERS], check=True, timeout=60)
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


def bdf_of(vm: Booted, device_id: str) -> str:
    nodes = vm.info()["device_tree"].values()
    (found,) = (
        node["pci_bdf"]
        for node in nodes
        if "pci_bdf" in node and device_id in (node["id"], *node["children"])
    )
    return str(found)


def add(vm: Booted, command: str, device: dict[str, Any]) -> None:
    answer = vm.vmm.put(command, device, expect=200)
    assert answer == {"id": device["id"], "bdf": bdf_of(vm, device["id"])}


def remove(vm: Booted, device_id: str) -> None:
    bdf, before = bdf_of(vm, device_id), removals(vm, device_id)
    vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
    wait_until(lambda: removals(vm, device_id) > before, f"{device_id} is removed", timeout_s=GUEST_S)
    assert device_id not in vm.info()["device_tree"]
    assert vm.run(f"test ! -e {pci_folder(bdf)} && echo gone") == "gone"


def removals(vm: Booted, device_id: str) -> int:
    return sum(
        event["event"] == "device-removed" and event["properties"]["id"] == device_id
        for event in vm.events.documents()
    )


def check_drive(vm: Booted, device_id: str, *, mark: str) -> None:
    """Fail unless the guest reads the NVMe drive where `vm.info` says; it leaves `mark` behind."""
    bdf = bdf_of(vm, device_id)
    assert bdf.startswith("0000:00:")
    glob = f"{pci_folder(bdf)}/nvme/nvme*"
    controller = vm.run(f"until ls -d {glob} 2>/dev/null; do usleep 20000; done", timeout_s=GUEST_S)
    name = f"{controller.split('/')[-1]}n1"
    vm.run(f"until test -b /dev/{name}; do usleep 20000; done", timeout_s=GUEST_S)
    assert vm.run(f"head -c {len(WORDS)} /dev/{name}") == WORDS
    vm.run(f"echo {mark} | dd of=/dev/{name} bs=512 seek=8 conv=sync,fsync 2>/dev/null")


def check_vdpa(vm: Booted, disk: VdpaDisk) -> None:
    name = find(vm, bdf_of(vm, disk.name), "block")
    assert vm.run(f"head -c {len(disk.name)} /dev/{name}") == disk.name
    vm.run(f"echo written | dd of=/dev/{name} bs=512 seek=8 conv=sync,fsync 2>/dev/null")
    assert disk.image.read_bytes()[4096:].startswith(b"written\n")


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
