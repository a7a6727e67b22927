"""Disks, for the matrix of devices."""

from __future__ import annotations

from typing import Any

from support.booted import MIB, Booted, make_image
from support.device.case import DeviceCase, find


class DiskCase(DeviceCase):
    name = "disk"
    command = "vm.add-disk"
    member = "disks"

    def device(self, device_id: str) -> dict[str, Any]:
        image = make_image(self.folder / f"{device_id}.raw", 4 * MIB)
        image.write_bytes(b"from the host".ljust(4 * MIB, b"\0"))
        return {"id": device_id, "path": str(image), "image_type": "Raw", "serial": device_id}

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        name = find(vm, bdf, "block")
        assert vm.run(f"cat /sys/block/{name}/serial") == device_id
        assert vm.run(f"head -c 13 /dev/{name}") == "from the host"
        vm.run(f"echo {device_id} | dd of=/dev/{name} bs=512 seek=8 conv=sync,fsync 2>/dev/null")
        written = (self.folder / f"{device_id}.raw").read_bytes()[4096:]
        assert written.startswith(f"{device_id}\n".encode())
