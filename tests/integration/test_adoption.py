"""A manager that is killed is followed by another, and no guest notices: from inside the guest.

Its managers share one guest, which each test leaves running and without what was added.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloudvmm.host.landlock import landlock_version
from support.booted import booting, vm_config
from support.deadline import GUEST_S, HOST_S
from support.id_map import check_id_maps
from support.inject import held
from support.process import status_of
from support.server import process_of
from support.shared import Shared, shared
from support.survivor import DISK, MIB, Lives, Survivor, surviving
from support.wait import wait_until

pytestmark = pytest.mark.qemu

SEED = 8
EXTRA = "extra.raw"
PMEM = "_memory"
OPEN = 2
FILTERED = 2  # SECCOMP_MODE_FILTER
needs_landlock = pytest.mark.skipif(landlock_version() < 1, reason="Landlock is missing")


@shared()
def shared_survivor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivor]:
    with surviving(tmp_path_factory.mktemp("survivor"), SEED) as found:
        yield found


@pytest.fixture
def survivor(shared_survivor: Shared[Survivor], request: pytest.FixtureRequest) -> Survivor:
    return shared_survivor.lend(request)


def extra_disk(survivor: Survivor) -> dict[str, str]:
    return {"id": DISK, "path": str(survivor.booted.folder / EXTRA), "image_type": "Raw"}


def test_guest_config_and_devices_are_there_behind_a_kill(survivor: Survivor) -> None:
    survivor.booted.vmm.put("vm.add-disk", extra_disk(survivor))
    before = survivor.settled_info()
    survivor.ask("echo kept > /tmp/word")
    survivor.replace_manager()

    assert survivor.settled_info() == before
    assert survivor.ask("cat /tmp/word") == "kept"
    survivor.settle()


def test_disk_that_was_plugged_before_a_kill_can_be_removed_and_used_by_others(survivor: Survivor) -> None:
    survivor.booted.vmm.put("vm.add-disk", extra_disk(survivor))
    survivor.replace_manager()
    survivor.ask("dd if=/dev/zero of=/dev/vdb bs=4096 count=1 conv=fsync 2>/dev/null")
    refusal = survivor.booted.vmm.put("vm.add-disk", {**extra_disk(survivor), "id": "again"}, expect=500)
    survivor.settle()

    assert "lock" in " ".join(refusal).lower()
    survivor.booted.vmm.put("vm.add-disk", extra_disk(survivor))
    survivor.settle()


def test_pause_and_resume_go_on_behind_a_kill(survivor: Survivor) -> None:
    survivor.booted.vmm.put("vm.pause")
    survivor.replace_manager()

    assert survivor.info()["state"] == "Paused"
    survivor.booted.vmm.put("vm.resume")
    assert survivor.ask("echo here") == "here"
    survivor.settle()


def test_disk_that_goes_while_there_is_no_manager_is_told_of_and_numbers_go_on(survivor: Survivor) -> None:
    vmm = survivor.booted.vmm
    vmm.put("vm.add-disk", extra_disk(survivor))
    wait_until(lambda: "vdb" in survivor.ask("ls /sys/block"), "the disk in the guest", timeout_s=GUEST_S)
    before = events(survivor)
    vmm.put("vm.remove-device", {"id": DISK})
    survivor.replace_manager()
    wait_until(lambda: DISK not in survivor.info()["device_tree"], "the disk is gone", timeout_s=GUEST_S)

    told = events(survivor)
    assert told[: len(before)] == before
    assert [event["number"] for event in told] == list(range(len(told)))
    assert count_of(told, "device-removed") == 1 + count_of(before, "device-removed")
    survivor.settle()


def test_second_manager_on_the_folder_is_refused(survivor: Survivor, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cloudvmm.cli.main", "--state-dir", str(survivor.state)]
    found = subprocess.run(
        [*command, "--api-socket", str(tmp_path / "api")], capture_output=True, timeout=HOST_S, check=False
    )

    assert found.returncode == 1
    assert b"in use by another running VMM" in found.stderr
    survivor.settle()


def test_folder_is_all_that_is_left(survivor: Survivor) -> None:
    """Nothing of the managers before is in the folder but what this one needs."""
    survivor.replace_manager()

    names = set(os.listdir(survivor.state)) - {"consoles", "doorway"}
    assert names == {
        *("lock", "format", "journal", "journal.old", "events", "vm"),
        *("machine", "pid", "argv", "qemu.log"),
    }
    survivor.settle()


@needs_landlock
def test_qemu_is_confined_behind_a_kill_and_gets_new_files_from_the_next_manager(survivor: Survivor) -> None:
    check_id_maps(survivor.booted.folder)
    survivor.replace_manager()
    pmem = {"id": PMEM, "file": str(survivor.booted.folder / EXTRA)}
    survivor.booted.vmm.put("vm.add-pmem", {**pmem, "discard_writes": True})
    survivor.replace_manager()

    assert PMEM in survivor.info()["device_tree"]
    assert status_of(survivor.qemu.pid, "NoNewPrivs") == 1
    assert status_of(survivor.qemu.pid, "Seccomp") == FILTERED
    image = os.fsencode(survivor.booted.folder / EXTRA) + b"\0"
    with held(survivor.qemu.pid) as thread:
        assert thread.call(OPEN, image, os.O_RDWR) == -errno.EACCES
        assert thread.call(OPEN, b"/dev/null\0", os.O_RDWR) > 0
    survivor.settle()


def test_guest_that_switches_itself_off_while_there_is_no_manager_is_off(survivor: Survivor) -> None:
    survivor.ask("(sleep 1; poweroff -f) >/dev/null 2>&1 &")
    survivor.booted.server.kill()
    wait_until(lambda: stands_still(survivor.qemu.pid), "the guest is off", timeout_s=GUEST_S)
    survivor.booted.server.restart()
    wait_until(lambda: survivor.info()["state"] == "Created", "the VM is off", timeout_s=HOST_S)

    assert not survivor.qemu.is_alive()
    survivor.boot_again()


def test_pipes_of_a_vm_that_died_with_its_manager_are_not_left(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with booting(tmp_path / "run", vm_config(), "--state-dir", str(state), shell=None) as vm:
        vm.server.kill(after=process_of(vm.qemu_pid()))
        assert sorted(os.listdir(state / "consoles")) == ["console.in", "console.out"]
        vm.server.restart()
        assert not (state / "consoles").exists()


def test_helper_goes_on_with_the_vm_and_is_ended_with_what_is_left_of_it(tmp_path: Path) -> None:
    vsock = {"cid": 3, "socket": str(tmp_path / "vsock")}
    lives = Lives(tmp_path, SEED, vsock=vsock, memory={"size": 256 * MIB, "shared": True})
    lives.boot()
    (helper,) = lives.helpers()
    lives.replace_manager()

    assert lives.info()["state"] == "Running"
    assert lives.helpers() == {helper}
    lives.replace_manager(with_qemu=True)
    assert lives.info()["state"] == "Created"
    assert lives.events()[-1] == "vm/shutdown"
    assert not helper.is_alive()
    assert not os.path.lexists(vsock["socket"])
    lives.close()


def test_helper_that_ends_while_there_is_no_manager_is_told_of(tmp_path: Path) -> None:
    vsock = {"cid": 3, "socket": str(tmp_path / "vsock")}
    lives = Lives(tmp_path, SEED, vsock=vsock, memory={"size": 256 * MIB, "shared": True})
    lives.boot()
    (helper,) = lives.helpers()
    helper.kill()
    lives.replace_manager()
    wait_until(lambda: "vm/device-helper-ended" in lives.events(), "the event", timeout_s=HOST_S)

    assert lives.info()["state"] == "Running"
    lives.close()


def events(survivor: Survivor) -> list[dict[str, Any]]:
    lines = (survivor.state / "events").read_bytes().splitlines()[1:]
    return [msgspec.json.decode(line) for line in lines]


def count_of(told: list[dict[str, Any]], name: str) -> int:
    return sum(event["event"] == name for event in told)


def stands_still(pid: int) -> bool:
    """Say whether no thread of a process has anything to do, for half a second."""
    before = cpu_ticks(pid)
    time.sleep(0.5)
    return cpu_ticks(pid) - before <= 1


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
