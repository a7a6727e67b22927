"""The vsock device, for the matrix of devices: socat is its program in the guest, which busybox has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.booted import Booted
from support.caller import call, serve_at
from support.device.case import GUEST_S, DeviceCase, pci_folder
from support.socat import payload_with_socat

_CID = 7


class VsockCase(DeviceCase):
    name = "vsock"
    command = "vm.add-vsock"
    member = "vsock"
    is_single = True
    unsaved = "lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.changes = {"payload": payload_with_socat(folder)}
        self._socket = folder / "vsock"

    def device(self, device_id: str) -> dict[str, Any]:
        return {"id": device_id, "cid": _CID, "socket": str(self._socket)}

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        driver = f"{pci_folder(bdf)}/virtio*/driver/module"
        vm.run(f"until ls -d {driver} 2>/dev/null; do usleep 20000; done", timeout_s=GUEST_S)
        vm.run("(socat -t 30 VSOCK-LISTEN:1024 EXEC:rev >/dev/null 2>&1 &)")
        with call(self._socket, 1024) as stream:
            assert stream.ask(b"to the guest\n") == b"tseug eht ot\n"
        with serve_at(self._socket, 2048) as heard:
            vm.run(f"echo from {device_id} | socat -t 30 - VSOCK-CONNECT:2:2048")
            assert heard.get(timeout=GUEST_S) == f"from {device_id}\n".encode()
