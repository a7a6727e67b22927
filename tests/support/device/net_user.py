"""Network devices on user-mode networking with a forward, for the matrix of devices."""

from __future__ import annotations

from typing import Any

from support.booted import Booted
from support.device.case import GUEST_S, DeviceCase, find
from support.stream import stream_from_guest, stream_to_guest

PORT, GUEST_PORT = 18080, 80


class NetUserCase(DeviceCase):
    name = "user-net"
    command = "vm.add-net"
    member = "net"

    def device(self, device_id: str) -> dict[str, Any]:
        return {"id": device_id, "user": {"forwards": [f"tcp:127.0.0.1:{PORT}:{GUEST_PORT}"]}}

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        name = find(vm, bdf, "net")
        configure_by_dhcp(vm, name)
        stream_from_guest(vm, "10.0.2.2", address="127.0.0.1", mib=1)
        stream_to_guest(vm, ("127.0.0.1", PORT), GUEST_PORT, mib=1)


DHCP_SCRIPT = """#!/bin/sh
[ "$1" = bound ] || exit 0
ifconfig $interface $ip netmask $subnet
route add default gw $router
"""


def configure_by_dhcp(vm: Booted, name: str) -> None:
    """Let the guest ask for its address, and make sure that it is the documented one."""
    vm.run(f"cat >/tmp/dhcp <<'end'\n{DHCP_SCRIPT}end\nchmod +x /tmp/dhcp")
    vm.run(f"ifconfig {name} up && udhcpc -n -q -f -i {name} -s /tmp/dhcp 2>&1", timeout_s=GUEST_S)
    shown = vm.run(f"ifconfig {name}; route -n")
    assert "inet addr:10.0.2.15 " in shown
    assert "10.0.2.2 " in shown
