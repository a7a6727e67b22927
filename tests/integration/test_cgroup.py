"""A control group for each machine: who is in it, that nobody gets out, and that none is ever left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from errno import EACCES
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.api.fleet import VmmsCreateData
from cloudvmm.host.landlock import landlock_version
from support.booted import MIB, booting, make_image, serving, vm_config
from support.cgroup import group_folder, groups_in, members_of
from support.daemon import Daemon
from support.deadline import GUEST_S, HOST_S
from support.fork import CloneVm
from support.inject import held
from support.server import process_of
from support.survivor import surviving
from support.vm import choose_engine, small_config
from support.vmm import Vmm
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

OPEN, MKDIR = 2, 83
FREE = ["--seccomp", "false", "--qemu-landlock", "false"]


@pytest.fixture
def groups() -> Iterator[Path]:
    """Where cloudvmm may make groups; it leaves none there."""
    with group_folder() as folder:
        yield folder
        wait_until(lambda: groups_in(folder) == [], "no group is left", timeout_s=HOST_S)


def flags(groups: Path, *more: str) -> list[str]:
    return ["--qemu-cgroup", str(groups), *more]


def helped(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a VM that takes helper programs."""
    if shutil.which("swtpm") is None:
        pytest.skip("swtpm is missing")
    (folder / "tpm").mkdir()
    vsock = {"cid": 3, "socket": str(folder / "vsock")}
    return vm_config(
        memory={"size": 256 * MIB, "shared": True},
        tpm={"state_dir": str(folder / "tpm")},
        vsock=vsock,
        **changes,
    )


def only_group(groups: Path) -> Path:
    (group,) = groups_in(groups)
    return group


def put_stray(group: Path) -> subprocess.Popen[bytes]:
    """Have a process in the group that is nobody's child there."""
    stray = subprocess.Popen(["sleep", "1000"])
    (group / "cgroup.procs").write_text(str(stray.pid))
    return stray


def named(path: object) -> bytes:
    return os.fsencode(str(path)) + b"\0"


def test_all_programs_of_a_vm_are_in_its_group_which_goes_with_it(groups: Path, tmp_path: Path) -> None:
    with booting(tmp_path / "run", helped(tmp_path), *flags(groups), shell=None) as vm:
        group = only_group(groups)
        children = {child.pid for child in vm.server.children()}
        assert len(children) >= 3
        assert members_of(group) == children
        stray = put_stray(group)
        vm.vmm.put("vm.reboot")
        assert stray.wait(HOST_S) == -signal.SIGKILL
        assert only_group(groups) != group
        vm.vmm.put("vm.shutdown")
        assert groups_in(groups) == []
        vm.vmm.put("vm.boot")
        only_group(groups)
        vm.vmm.put("vm.delete")
        assert groups_in(groups) == []


def test_boot_that_fails_leaves_no_group(groups: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "run", *flags(groups)) as vm:
        vm.vmm.put("vm.create", vm_config(rng={"src": str(tmp_path / "none")}))
        vm.vmm.put("vm.boot", expect=500)
        assert groups_in(groups) == []


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(
            ["--qemu-user", "root"],
            id="landlock",
            marks=pytest.mark.skipif(landlock_version() < 1, reason="Landlock is missing"),
        ),
        pytest.param(
            FREE, id="user", marks=pytest.mark.skipif(os.geteuid() != 0, reason="QEMU has no other user")
        ),
    ],
)
def test_qemu_cannot_leave_its_group_by_either_of_what_holds_it(
    more: list[str], groups: Path, tmp_path: Path
) -> None:
    with booting(tmp_path / "run", vm_config(), *flags(groups, *more), shell=None) as vm:
        group = only_group(groups)
        files = [groups / "cgroup.procs", group / "cgroup.procs", group / "cgroup.kill", group / "pids.max"]
        calls = [(OPEN, named(path), os.O_WRONLY) for path in files[:3]]
        calls.append((MKDIR, named(group / "below"), 0o700))
        calls.append((MKDIR, named(groups / "beside"), 0o700))
        with held(vm.qemu_pid()) as thread:
            assert [thread.call(*call) for call in calls] == [-EACCES] * len(calls)
        opened = [os.readlink(link) for link in Path(f"/proc/{vm.qemu_pid()}/fd").iterdir()]
        assert not [path for path in opened if "cgroup" in path]


def test_group_of_a_manager_that_was_killed_goes_when_the_next_starts(groups: Path, tmp_path: Path) -> None:
    with booting(tmp_path / "run", helped(tmp_path), *flags(groups), shell=None) as vm:
        stray = put_stray(only_group(groups))
        vm.server.kill()
        vm.server.restart()
        assert groups_in(groups) == []
        assert stray.wait(HOST_S) == -signal.SIGKILL
        vm.vmm.put("vm.create", vm_config())
        vm.vmm.put("vm.boot")
        only_group(groups)


def test_group_of_another_manager_is_let_alone(groups: Path, tmp_path: Path) -> None:
    with booting(tmp_path / "one", vm_config(), *flags(groups), shell=None) as one:
        group = only_group(groups)
        with serving(tmp_path / "other", *flags(groups)):
            assert only_group(groups) == group
            assert members_of(group) == {one.qemu_pid()}


def test_vm_that_outlives_its_manager_keeps_its_group(groups: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", MIB)
    vsock = {"cid": 3, "socket": str(tmp_path / "vsock")}
    with surviving(tmp_path, 1, *flags(groups), vsock=vsock) as survivor:
        vm = survivor.booted
        group = only_group(groups)
        members = members_of(group)
        assert survivor.qemu.pid in members
        assert len(members) == 2
        vm.server.kill()
        with serving(tmp_path / "other", *flags(groups)):
            assert members_of(group) == members
        vm.server.restart()
        assert members_of(group) == members
        survivor.check()
        vm.vmm.put("vm.remove-device", {"id": vm.config()["vsock"]["id"]})
        wait_until(lambda: members_of(group) == {survivor.qemu.pid}, "it goes", timeout_s=GUEST_S)
        wait_until(lambda: not vm.config().get("vsock"), "it is gone", timeout_s=GUEST_S)
        vm.vmm.put("vm.add-vsock", vsock)
        assert len(members_of(group)) == 2
        vm.vmm.put("vm.add-disk", {"path": str(image), "image_type": "Raw"})
        vm.vmm.put("vm.reboot")
        assert only_group(groups) != group
        survivor.qemu = survivor.find_qemu()
        vm.vmm.put("vm.shutdown")
        assert groups_in(groups) == []
        assert not (survivor.state / "cgroup").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cloudvmm-kept-0123456789ab", "The control group of the VM is not there any more"),
        ("cloudvmm-kept-ba9876543210", "What is in the control group of the VM is not ended with it"),
    ],
)
def test_vm_whose_group_cannot_be_had_is_taken_over_without_it(
    name: str, told: str, groups: Path, tmp_path: Path
) -> None:
    (tmp_path / "cloudvmm-kept-ba9876543210").touch()
    state = tmp_path / "state"
    with booting(tmp_path / "run", vm_config(), *flags(groups, "--state-dir", str(state)), shell=None) as vm:
        group = only_group(groups)
        members = members_of(group)
        vm.server.kill()
        (state / "cgroup").write_text(str(tmp_path / name))
        vm.server.restart()
        assert told in vm.server.stderr
        assert members_of(group) == members
        vm.vmm.put("vm.shutdown")
        group.rmdir()


@pytest.mark.skipif(landlock_version() < 3, reason="Landlock is missing or too old")
def test_manager_that_makes_no_groups_and_is_held_to_files_removes_the_one_it_took_over(
    groups: Path, tmp_path: Path
) -> None:
    state = ("--state-dir", str(tmp_path / "state"))
    config = vm_config(landlock_enable=True)
    with booting(tmp_path / "run", config, *flags(groups, *state), shell=None) as vm:
        group = only_group(groups)
        vm.server.kill()
        vm.server.drop_flag("--qemu-cgroup")
        vm.server.restart()
        assert only_group(groups) == group
        vm.vmm.put("vm.shutdown")
        assert groups_in(groups) == []


def test_what_is_left_of_a_vm_that_died_with_its_manager_is_removed(groups: Path, tmp_path: Path) -> None:
    state = ("--state-dir", str(tmp_path / "state"))
    with booting(tmp_path / "run", vm_config(), *flags(groups, *state), shell=None) as vm:
        stray = put_stray(only_group(groups))
        vm.server.kill(after=process_of(vm.qemu_pid()))
        vm.server.restart()
        assert groups_in(groups) == []
        assert stray.wait(HOST_S) == -signal.SIGKILL


def test_clones_have_groups_of_their_own(groups: Path, tmp_path: Path) -> None:
    with booting(tmp_path / "run", vm_config(), *flags(groups)) as vm:
        first = only_group(groups)
        told = vm.vmm.put("vm.fork", {"directory": str(tmp_path), "count": 2}, expect=200)
        clones = [CloneVm(each, has_shell=False) for each in told["clones"]]
        assert len(groups_in(groups)) == 3
        assert sorted(map(len, map(members_of, groups_in(groups)))) == [1, 1, 1]
        for clone in clones:
            clone.end()
        wait_until(lambda: groups_in(groups) == [first], "their groups go", timeout_s=HOST_S)


def test_vm_that_arrives_has_a_group_and_the_one_that_left_none(groups: Path, tmp_path: Path) -> None:
    with (
        booting(tmp_path / "one", vm_config(), *flags(groups)) as one,
        serving(tmp_path / "two", *flags(groups)) as two,
    ):
        first = only_group(groups)
        with ThreadPoolExecutor(1) as pool, two.vmm.second() as other:
            url = {"receiver_url": f"unix:{tmp_path}/m"}
            arrival = pool.submit(other.put, "vm.receive-migration", url)
            wait_until((tmp_path / "m").exists, "the receiver listens", timeout_s=GUEST_S)
            one.vmm.put("vm.send-migration", {"destination_url": f"unix:{tmp_path}/m"})
            arrival.result(GUEST_S)
        wait_until(lambda: first not in groups_in(groups), "the group goes", timeout_s=GUEST_S)
        assert members_of(only_group(groups)) == {two.qemu_pid()}


@pytest.mark.skipif(landlock_version() < 3, reason="Landlock is missing or too old")
def test_vmm_that_is_held_to_the_files_of_its_vm_makes_groups_too(groups: Path, tmp_path: Path) -> None:
    config = vm_config(landlock_enable=True)
    with booting(tmp_path / "run", config, *flags(groups), shell=None) as vm:
        first = only_group(groups)
        vm.vmm.put("vm.reboot")
        assert only_group(groups) != first


def test_vms_of_a_daemon_have_groups_of_their_own(groups: Path, tmp_path: Path) -> None:
    engine = choose_engine("qemu")
    daemon = Daemon(tmp_path / "d", [*engine.flags, *flags(groups)])
    daemon.wait_ready()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        vmm = Vmm(daemon.client.vmms_create(VmmsCreateData(id=name)).api_socket)
        vmm.put("vm.create", small_config(engine, tmp_path / name))
        vmm.put("vm.boot")
        vmm.close()
    assert [len(members_of(group)) for group in groups_in(groups)] == [1, 1]
    daemon.check_end()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("relative", ""),
        ("/none", "No such file or directory"),
        ("/proc", "It is no folder of control groups"),
        ("/sys", "It is no folder of control groups"),
    ],
)
def test_folder_that_does_not_serve_ends_the_start_with_the_reason(
    path: str, reason: str, tmp_path: Path
) -> None:
    for words in ([], ["daemon"]):
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "cloudvmm.cli.main",
                *words,
                "--api-socket",
                str(tmp_path / "s"),
                "--qemu-cgroup",
                path,
            ],
            capture_output=True,
            text=True,
            timeout=HOST_S,
            check=False,
        )
        assert child.returncode == 1
        assert "Error parsing --qemu-cgroup" in child.stderr
        assert f"given: {path}" in child.stderr
        assert reason in child.stderr


def test_group_is_that_of_the_vm_alone_unless_asked_for_there_is_none(tmp_path: Path) -> None:
    with booting(tmp_path / "run", vm_config(), shell=None) as vm:
        ours = Path(f"/proc/{vm.server.pid}/cgroup").read_text()
        assert Path(f"/proc/{vm.qemu_pid()}/cgroup").read_text() == ours
