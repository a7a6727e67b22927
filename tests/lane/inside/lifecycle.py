"""Run inside the outer machine: a VM's whole life through the REST API, on KVM, seen from in- and outside."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.guest.error import GuestShellTimeout
from support.server import Server
from support.vm import Guest
from support.vmm import Vmm

SCRIPT_S = 30.0
STILLNESS_S = 1.0
READ_BYTES = 64 * 1024


@pytest.fixture
def vm_config(vm_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(READ_BYTES))
    vm_config["disks"] = [{"path": str(image), "image_type": "Raw"}]
    return vm_config


def test_vm_lives_its_whole_life_on_kvm(server: Server, vm_booted: Vmm, guest: Guest) -> None:
    vmm = vm_booted
    assert vmm.get("vm.info")["state"] == "Running"
    guest.wait_kernel_log(b"cloudvmm-guest ready")
    assert_runs_on_kvm(server, guest)

    vmm.put("vm.pause")
    assert vmm.get("vm.info")["state"] == "Paused"
    with pytest.raises(GuestShellTimeout):
        guest.shell.run("true", timeout_s=STILLNESS_S)
    vmm.put("vm.resume")
    assert ask(guest, "echo awake") == "awake"

    ask(guest, "cat /dev/vda >/dev/null")
    assert vmm.get("vm.counters")["_disk0"]["read_bytes"] >= READ_BYTES

    first_boot = ask(guest, "cat /proc/sys/kernel/random/boot_id")
    vmm.put("vm.reboot")
    guest.wait_ready()
    assert ask(guest, "cat /proc/sys/kernel/random/boot_id") != first_boot
    assert_runs_on_kvm(server, guest)

    vmm.put("vm.shutdown")
    assert vmm.get("vm.info")["state"] == "Created"
    assert not server.children()
    vmm.put("vm.delete")
    vmm.get("vm.info", expect=404)


def assert_runs_on_kvm(server: Server, guest: Guest) -> None:
    """By QEMU's arguments, by what the kernel gave it, and by the guest's own words."""
    (qemu,) = (child for child in server.children() if is_qemu(child.pid))
    arguments = Path(f"/proc/{qemu.pid}/cmdline").read_text().split("\0")
    assert arguments[arguments.index("-accel") + 1].split(",")[0] == "kvm"
    assert {"anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0"} <= open_files(qemu.pid)
    assert "Hypervisor detected: KVM" in ask(guest, "dmesg")


def is_qemu(pid: int) -> bool:
    return os.readlink(f"/proc/{pid}/exe").rpartition("/")[2].startswith("qemu-system-")


def open_files(pid: int) -> set[str]:
    """Return what the descriptors of `pid` are, leaving out those that go while we look."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def ask(guest: Guest, script: str) -> str:
    """Return what `script` prints inside the guest; fail if it fails."""
    status, output = guest.shell.run(script, timeout_s=SCRIPT_S)
    assert status == 0, output
    return output.decode().strip()
