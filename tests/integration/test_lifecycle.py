"""Pause, resume, reset, coredump and a second life, each shown by the guest itself."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.guest.error import GuestShellTimeout
from support.booted import MIB, Booted, booting, make_image, serving, vm_config
from support.shared import shared

pytestmark = [pytest.mark.qemu]

RAM_BYTES = 160 * MIB
PAUSE_S = 2.0
GDB_S = 60.0
KERNEL = 0xFFFF_8000_0000_0000
ELF_CORE, X86_64, PT_LOAD, PT_NOTE, NT_PRSTATUS = 4, 62, 1, 4, 1


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    config = vm_config(cpus={"boot_vcpus": 2, "max_vcpus": 2}, memory={"size": RAM_BYTES})
    with booting(tmp_path_factory.mktemp("lifecycle"), config) as booted:
        yield booted


def uptime_s(vm: Booted) -> float:
    return float(vm.run("cut -d' ' -f1 /proc/uptime"))


def vcpu_ticks(vm: Booted) -> int:
    """Return the processor time that the guest's vCPUs have used, in clock ticks."""
    tasks = Path(f"/proc/{vm.qemu_pid()}/task").iterdir()
    vcpus = [task for task in tasks if "CPU" in (task / "comm").read_text()]
    assert vcpus
    fields = [(task / "stat").read_text().rpartition(")")[2].split() for task in vcpus]
    return sum(int(each[11]) + int(each[12]) for each in fields)


def test_paused_guest_stands_still_and_resumed_one_goes_on(vm: Booted) -> None:
    vm.run("(while :; do :; done) & echo $! >/tmp/busy")
    started, before = time.monotonic(), uptime_s(vm)
    vm.vmm.put("vm.pause")
    assert vm.info()["state"] == "Paused"
    ticks = vcpu_ticks(vm)
    # The guest would answer within this time, and its busy loop would use most of it.
    assert vm.vmm.put("vm.pause", expect=500)[-1].endswith("InvalidStateTransition(Paused, Paused)")
    with pytest.raises(GuestShellTimeout):
        vm.shell.run("echo a word", timeout_s=PAUSE_S)
    assert vcpu_ticks(vm) - ticks < 20
    assert vm.vmm.get("vm.counters") == {}

    vm.vmm.put("vm.resume")
    assert vm.info()["state"] == "Running"
    vm.run("kill $(cat /tmp/busy)")
    guest_s = uptime_s(vm) - before
    assert guest_s < time.monotonic() - started - PAUSE_S + 0.1
    assert vm.events.names("vm")[2:] == ["vm/pausing", "vm/paused", "vm/pausing", "vm/resuming", "vm/resumed"]


def test_coredump_of_a_running_guest_holds_its_memory_and_every_vcpu(vm: Booted, tmp_path: Path) -> None:
    secret = "a secret of " + "the guest 4f1c"
    vm.run(f"echo {secret} | tee /tmp/secret")
    before = len(vm.events.names("vm"))
    vm.vmm.put("vm.coredump", {"destination_url": f"file://{tmp_path}/core"})
    assert vm.events.names("vm")[before:] == [
        *("vm/coredumping", "vm/pausing", "vm/paused", "vm/resuming", "vm/resumed")
    ]
    assert vm.info()["state"] == "Running"
    assert vm.run("cat /tmp/secret") == secret

    core = (tmp_path / "core").read_bytes()
    segments = program_headers(core)
    assert sum(size for kind, _, size in segments if kind == PT_LOAD) >= RAM_BYTES
    notes = b"".join(core[offset : offset + size] for kind, offset, size in segments if kind == PT_NOTE)
    assert [kind for kind in note_kinds(notes) if kind == NT_PRSTATUS] == [NT_PRSTATUS] * 2
    assert secret.encode() in core


def test_gdb_opens_a_coredump_and_finds_each_vcpu_in_the_kernel(vm: Booted, tmp_path: Path) -> None:
    gdb, core = shutil.which("gdb"), tmp_path / "core"
    if gdb is None:
        pytest.skip("gdb is missing")
    vm.run("sync")
    vm.vmm.put("vm.coredump", {"destination_url": f"file://{core}"}, expect=204)
    commands = ("info threads", "thread apply all print /x $rip")
    said = subprocess.run(
        [gdb, "-nx", "-batch", *(word for each in commands for word in ("-ex", each)), "-core", str(core)],
        capture_output=True,
        text=True,
        check=True,
        timeout=GDB_S,
    ).stdout
    core.unlink()
    assert len(re.findall(r"^[* ] +\d+ ", said, re.MULTILINE)) == 2
    places = [int(place, 16) for place in re.findall(r"^\$\d+ = 0x([0-9a-f]+)", said, re.MULTILINE)]
    assert len(places) == 2
    assert any(place >= KERNEL for place in places), said


def test_coredump_to_a_file_that_exists_is_refused_and_the_guest_unharmed(vm: Booted, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    chain = vm.vmm.put("vm.coredump", {"destination_url": f"file://{taken}"}, expect=500)
    assert chain[:2] == ["Error from API", "The VM could not be coredumped"]
    assert taken.read_text() == "mine"
    assert vm.info()["state"] == "Running"
    assert vm.run("echo on") == "on"


def program_headers(core: bytes) -> list[tuple[int, int, int]]:
    """Return kind, offset and size in the file of each segment of an ELF64 core of x86-64."""
    assert core[:6] == b"\x7fELF\x02\x01"
    assert struct.unpack_from("<HH", core, 16) == (ELF_CORE, X86_64)
    (start,) = struct.unpack_from("<Q", core, 32)
    size, count = struct.unpack_from("<HH", core, 54)
    headers = (struct.unpack_from("<IIQQQQQQ", core, start + index * size) for index in range(count))
    return [(header[0], header[2], header[5]) for header in headers]


def note_kinds(notes: bytes) -> list[int]:
    kinds, position = [], 0
    while position < len(notes):
        name_bytes, content_bytes, kind = struct.unpack_from("<III", notes, position)
        kinds.append(kind)
        position += 12 + (name_bytes + 3) // 4 * 4 + (content_bytes + 3) // 4 * 4
    return kinds


def test_vm_that_runs_is_not_booted_again(vm: Booted) -> None:
    before = uptime_s(vm)
    assert vm.vmm.put("vm.boot", expect=500)[-1] == "VM is already created"
    assert vm.vmm.put("vm.create", vm_config(), expect=500)[-1] == "VM is already created"
    assert uptime_s(vm) > before


def test_shut_down_vm_boots_afresh_and_deleted_one_is_gone(vm: Booted) -> None:
    vm.run("touch /tmp/earlier")
    vm.vmm.put("vm.shutdown")
    info = vm.info()
    assert info["state"] == "Created"
    assert "device_tree" not in info
    vm.vmm.put("vm.boot")
    vm.open_shell()
    vm.wait_ready()
    assert vm.run("ls /tmp/earlier 2>/dev/null || echo gone") == "gone"
    vm.vmm.put("vm.delete")
    assert vm.vmm.get("vm.info", expect=404)[-1] == "VM is not created"
    assert vm.events.names("vm")[-2:] == ["vm/shutdown", "vm/deleted"]


def test_disk_of_a_running_vm_is_locked_against_a_second_one(tmp_path: Path) -> None:
    disk = {"path": str(make_image(tmp_path / "disk.raw", MIB)), "image_type": "Raw"}
    reader = disk | {"readonly": True}
    first_vm = booting(tmp_path / "first", vm_config(disks=[disk]), shell=None)
    with first_vm as first, serving(tmp_path / "second") as second:
        second.vmm.put("vm.create", vm_config(disks=[reader]))
        chain = second.vmm.put("vm.boot", expect=500)
        assert "Error locking disk images: Another instance likely holds a lock" in chain
        assert second.info()["state"] == "Created"
        assert second.vmm.put("vm.boot", expect=500)[-1] == "VM is already created"
        second.vmm.put("vm.shutdown")

        first.vmm.put("vm.shutdown")
        second.vmm.put("vm.boot")
        assert second.info()["state"] == "Running"
