"""Network devices that a vhost-user back end serves, for the matrix of devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from support.booted import Booted
from support.device.case import DeviceCase, find
from support.namespace import ip, open_tap, ping
from support.stream import stream_from_guest
from support.vhost_user_net import VhostUserNet

HOST, GUEST = "192.168.78.1", "192.168.78.2"


class NetVhostUserCase(DeviceCase):
    name = "vhost-user-net"
    command = "vm.add-net"
    member = "net"
    unsaved = "lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD"
    changes: ClassVar[dict[str, Any]] = {"memory": {"size": 256 << 20, "shared": True}}

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._tap = -1
        self._backend: VhostUserNet | None = None

    def device(self, device_id: str) -> dict[str, Any]:
        if self._backend is None:
            (self._tap,) = open_tap("vu0", has_header=False)
            ip(f"addr add {HOST}/24 dev vu0")
            ip("link set vu0 up")
            self._backend = VhostUserNet(self.folder / "net.sock", self._tap)
        return {"id": device_id, "vhost_user": True, "vhost_socket": str(self._backend.path)}

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        name = find(vm, bdf, "net")
        vm.run(f"ifconfig {name} {GUEST} netmask 255.255.255.0 up && ping -c 2 -W 10 {HOST}")
        ping(GUEST)
        stream_from_guest(vm, HOST, address=HOST, mib=1)

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
            self._backend = None
            os.close(self._tap)
