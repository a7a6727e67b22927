"""Devices of the passthrough lane's machine: how they are given to a guest, and how it is seen to have them.

Used inside that machine.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from support.booted import MIB, Booted
from support.device.case import GUEST_S, find, pci_folder
from support.wait import wait_until

WORDS = "from the drive"
DRIVERS = ("vfio_pci", "vfio_iommu_type1", "vduse", "vhost_vdpa", "ahci")


class Host:
    """The outer machine's devices, as its administrator handles them."""

    def __init__(self) -> None:
        subprocess.run(["modprobe", "-a", *DRIVERS], check=True, timeout=60)

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
        # Its name is there before its queues are, and without them it is refused.
        wait_until(self._is_added, f"{name} is served", timeout_s=GUEST_S)
        self.path = wait_until(self._node, f"{name} has a node", timeout_s=GUEST_S)

    def _is_added(self) -> bool:
        argv = ["vdpa", "dev", "add", "name", self.name, "mgmtdev", "vduse"]
        return subprocess.run(argv, check=False, timeout=30).returncode == 0

    def _node(self) -> str | None:
        found = list(Path(f"/sys/bus/vdpa/devices/{self.name}").glob("vhost-vdpa-*"))
        return f"/dev/{found[0].name}" if found and Path("/dev", found[0].name).exists() else None

    def close(self) -> None:
        subprocess.run(["vdpa", "dev", "del", self.name], check=True, timeout=30)
        self._server.terminate()
        self._server.wait(30)


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
