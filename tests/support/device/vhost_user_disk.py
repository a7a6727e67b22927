"""Disks that qemu-storage-daemon serves, for the matrix of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from support.booted import MIB, Booted, make_image
from support.device.case import DeviceCase, find
from support.storage_daemon import StorageDaemon


class VhostUserDiskCase(DeviceCase):
    name = "disk-vhost-user"
    command = "vm.add-disk"
    member = "disks"
    changes: ClassVar[dict[str, Any]] = {"memory": {"size": 256 * MIB, "shared": True}}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._daemons: dict[str, StorageDaemon] = {}

    def device(self, device_id: str) -> dict[str, Any]:
        if device_id not in self._daemons:
            image = make_image(self.folder / f"{device_id}.raw", 4 * MIB)
            image.write_bytes(b"from the host".ljust(4 * MIB, b"\0"))
            self._daemons[device_id] = StorageDaemon(str(self.folder / f"{device_id}.sock"), image)
        socket = self._daemons[device_id].path
        return {"id": device_id, "vhost_user": True, "vhost_socket": socket}

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        name = find(vm, bdf, "block")
        assert vm.run(f"head -c 13 /dev/{name}") == "from the host"
        vm.run(f"echo {device_id} | dd of=/dev/{name} bs=512 seek=8 conv=sync,fsync 2>/dev/null")
        written = (self.folder / f"{device_id}.raw").read_bytes()[4096:]
        assert written.startswith(f"{device_id}\n".encode())

    def close(self) -> None:
        for daemon in self._daemons.values():
            daemon.close()
