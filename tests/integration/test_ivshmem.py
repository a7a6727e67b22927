"""Memory that a guest shares with a file of the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.booted import MIB, booting, make_image, serving, vm_config
from support.deadline import GUEST_S
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]


def test_guest_and_host_see_what_the_other_writes(tmp_path: Path) -> None:
    file = make_image(tmp_path / "shared", MIB)
    ivshmem = {"path": str(file), "size": MIB, "pci_device_id": 12}
    with booting(tmp_path / "run", vm_config(ivshmem=ivshmem)) as vm:
        assert vm.info()["device_tree"]["__ivshmem"]["pci_bdf"] == "0000:00:0c.0"
        folder = "/sys/bus/pci/devices/0000:00:0c.0"
        assert vm.run(f"cat {folder}/vendor {folder}/device") == "0x1af4\n0x1110"
        base = int(vm.run(f"sed -n 3p {folder}/resource").split()[0], 16)
        vm.run(f"echo 1 >{folder}/enable; devmem {base:#x} 32 0x74736567")
        wait_until(
            lambda: file.read_bytes()[:4] == b"gest", "the guest's word is in the file", timeout_s=GUEST_S
        )
        with file.open("r+b") as shared:
            shared.write(b"host")
        assert int(vm.run(f"devmem {base:#x} 32"), 16).to_bytes(4, "little") == b"host"


def test_file_that_was_cut_is_refused_at_the_boot(tmp_path: Path) -> None:
    file = make_image(tmp_path / "shared", MIB)
    with serving(tmp_path / "run") as server:
        server.vmm.put("vm.create", vm_config(ivshmem={"path": str(file), "size": MIB}))
        make_image(file, 0)
        assert "ivshmem" in " ".join(server.vmm.put("vm.boot", expect=400))
