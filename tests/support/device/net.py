"""Network devices on a TAP that we make, for the matrix of devices."""

from __future__ import annotations

from typing import Any

from support.booted import Booted
from support.device.case import DeviceCase, find
from support.namespace import ping


class NetCase(DeviceCase):
    name = "net"
    command = "vm.add-net"
    member = "net"

    def device(self, device_id: str) -> dict[str, Any]:
        # The guest of a snapshot goes on with what it knows of the host, the address of the TAP too.
        return {
            "id": device_id,
            "tap": "matrix0",
            "ip": "192.168.77.1",
            "mask": "255.255.255.0",
            "host_mac": "2e:89:a8:e4:bf:01",
        }

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        name = find(vm, bdf, "net")
        vm.run(f"ifconfig {name} 192.168.77.2 netmask 255.255.255.0 up && ping -c 2 -W 10 192.168.77.1")
        ping("192.168.77.2")
        assert vm.vmm.get("vm.counters")[device_id]["tx_frames"] >= 2
