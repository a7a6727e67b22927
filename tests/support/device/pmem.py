"""Persistent memory on a file, for the matrix of devices."""

from __future__ import annotations

from typing import Any

from support.booted import MIB, Booted, make_image
from support.device.case import GUEST_S, DeviceCase, pci_folder

BYTES = 4 * MIB


class PmemCase(DeviceCase):
    name = "pmem"
    command = "vm.add-pmem"
    member = "pmem"
    stays = "cannot unplug persistent memory"
    unsaved = "QEMU does not save persistent memory devices"

    def device(self, device_id: str) -> dict[str, Any]:
        file = make_image(self.folder / f"{device_id}.img", BYTES)
        file.write_bytes(b"from the host".ljust(BYTES, b"\0"))
        return {"id": device_id, "file": str(file)}

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        name = block_name(vm, bdf)
        assert vm.run(f"cat /sys/block/{name}/size") == str(BYTES // 512)
        assert vm.run(f"head -c 13 /dev/{name}") == "from the host"
        vm.run(f"echo {device_id} | dd of=/dev/{name} bs=4096 seek=1 conv=sync,fsync 2>/dev/null")
        written = (self.folder / f"{device_id}.img").read_bytes()[4096:]
        assert written.startswith(f"{device_id}\n".encode())


def block_name(vm: Booted, bdf: str) -> str:
    """Return the guest's name of the block device that the persistent memory at `bdf` is."""
    glob = f"{pci_folder(bdf)}/virtio*/ndbus*/region*/namespace*/block/*"
    return vm.run(f"until ls -d {glob} 2>/dev/null; do usleep 20000; done", timeout_s=GUEST_S).split("/")[-1]
