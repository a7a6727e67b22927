"""The oldest QEMU that is supported, 7.2, runs a guest through its whole life.

It is the one that CLOUDVMM_TEST_OLD_QEMU names: a folder into which Debian's packages of it were unpacked.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.booted import MIB, booting, make_image, vm_config
from support.old_qemu import old_qemu_program

pytestmark = [pytest.mark.qemu]


@pytest.fixture
def old_qemu(tmp_path: Path) -> str:
    """A program that is the old QEMU, with its own modules and firmware."""
    return str(old_qemu_program(tmp_path))


def test_old_qemu_runs_a_guest_from_boot_to_power_off(old_qemu: str, tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk.raw", MIB)
    core = tmp_path / "core"
    config = vm_config(disks=[{"path": str(disk), "serial": "old"}])
    folder = tmp_path / "run"
    folder.mkdir()

    with booting(folder, config, "--qemu", old_qemu, "--no-shutdown") as vm:
        assert vm.run("cat /sys/block/vda/serial") == "old"
        vm.events.wait("virtio-device/activated", count=3)
        vm.vmm.put("vm.pause")
        vm.vmm.put("vm.coredump", {"destination_url": f"file://{core}"})
        vm.vmm.put("vm.resume")
        vm.vmm.put("vm.nmi")
        vm.run("dd if=/dev/vda of=/dev/null bs=64k count=4")
        assert vm.vmm.get("vm.counters")["_disk0"]["read_bytes"] >= 4 * 65536
        vm.vmm.put("vm.reboot")
        vm.close_shell()
        vm.open_shell()
        vm.wait_ready()
        vm.vmm.put("vm.power-button")
        vm.events.wait("vm/shutdown")
        assert vm.info()["state"] == "Created"

    with core.open("rb") as file:
        assert file.read(4) == b"\x7fELF"
    core.unlink()
