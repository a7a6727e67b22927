"""Devices that a program of ours serves over vfio-user, for the matrix of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.booted import MIB, Booted
from support.device.case import DeviceCase, pci_folder
from support.vfio_user import DEVICE, MAGIC, VENDOR, VfioUserServer

WORD = 0x5EED0001


class UserDeviceCase(DeviceCase):
    name = "user-device"
    command = "vm.add-user-device"
    member = "user_devices"
    changes = {"memory": {"size": 256 * MIB, "shared": True}}  # noqa: RUF012
    unsaved = "QEMU does not save vfio-user devices"
    oldest = (11, 0)
    refusal = "vfio-user devices need a QEMU with the device vfio-user-pci, which comes with QEMU 11.0"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.servers: dict[str, VfioUserServer] = {}

    def device(self, device_id: str) -> dict[str, Any]:
        if device_id in self.servers:
            self.servers.pop(device_id).close()
        server = self.servers[device_id] = VfioUserServer(self.folder / f"{device_id}.sock")
        return {"id": device_id, "socket": str(server.path)}

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        folder, server = pci_folder(bdf), self.servers[device_id]
        assert vm.run(f"cat {folder}/vendor {folder}/device") == f"{VENDOR:#06x}\n{DEVICE:#06x}"
        vm.run(f"echo 1 >{folder}/enable")  # no driver does
        address = int(vm.run(f"head -n 1 {folder}/resource").split()[0], 16)
        assert int(vm.run(f"devmem {address:#x} 32"), 16) == MAGIC
        vm.run(f"devmem {address + 4:#x} 32 {WORD:#x}")
        assert int(vm.run(f"devmem {address + 4:#x} 32"), 16) == WORD
        assert server.bar[4:8] == WORD.to_bytes(4, "little")
        assert server.mapped > 0  # it has the guest's memory

    def close(self) -> None:
        for server in self.servers.values():
            server.close()
