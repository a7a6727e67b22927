"""A VMM that is held to the files of its VM, tried by its API and looked at from outside."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.host.landlock import landlock_version
from support.booted import MIB, Booted, booting, default_guest, direct_boot, make_image, serving, vm_config
from support.deadline import BOOT_S, GUEST_S, HOST_S
from support.device.fs import SHARED_MEMORY, virtiofsd_program
from support.shared import Shared, shared
from support.vmm import error_words
from support.wait import wait_until

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(landlock_version() < 3, reason="Landlock is missing or too old"),
]


def marks_of(vm: Booted) -> set[str]:
    """Return what the VMM's threads say of their privileges."""
    found = set()
    for path in Path(f"/proc/{vm.server.pid}/task").glob("*/status"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended
            found.update(re.findall(r"^NoNewPrivs:\s*(\d)", path.read_text(), re.MULTILINE))
    return found


def refusal(vm: Booted, command: str, data: dict[str, Any]) -> str:
    """Return the last words of a refused command."""
    return error_words(vm.vmm.exchange("PUT", command, data))[-1]


@shared()
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A server started with `--landlock` and a VM; in the folder `images` is what belongs to it, and more."""
    folder = tmp_path_factory.mktemp("landlock")
    images = folder / "images"
    images.mkdir()
    for name in ("own", "ruled", "other"):
        make_image(images / name, MIB)
    payload = direct_boot()
    flags = [
        *(
            "--kernel",
            payload["kernel"],
            "--initramfs",
            payload["initramfs"],
            "--cmdline",
            payload["cmdline"],
        ),
        *("--memory", "size=256M", "--serial", "null", "--console", "pty"),
        *("--disk", f"path={images}/own", "--landlock"),
        *("--landlock-rules", f"path={images}/ruled,access=rw"),
    ]
    with serving(folder, *flags) as vm:
        wait_until(lambda: vm.vmm.exchange("GET", "vm.info").status == 200, "a VM", timeout_s=HOST_S)
        wait_until(lambda: vm.info()["state"] == "Running", "the VM runs", timeout_s=BOOT_S)
        vm.open_shell()
        vm.wait_ready()
        yield vm


@pytest.fixture
def vm(started: Shared[Booted], request: pytest.FixtureRequest) -> Booted:
    return started.lend(request)


def test_every_thread_of_the_vmm_is_held(vm: Booted) -> None:
    # Landlock leaves no mark of its own, but a thread gives up further privileges with it. Who finds out
    # about the engine is free, and ends soon.
    wait_until(lambda: marks_of(vm) == {"1"}, "all have given up privileges", timeout_s=GUEST_S)


def test_a_disk_comes_only_from_where_the_rules_say(vm: Booted) -> None:
    images = vm.folder / "images"
    assert refusal(vm, "vm.add-disk", {"path": f"{images}/other"}).startswith("Permission denied")
    vm.vmm.put("vm.add-disk", {"path": f"{images}/ruled", "id": "ruled"}, expect=200)
    try:
        wait_until(
            lambda: vm.run("ls /sys/block | grep -c ^vd") == "2", "the guest has it", timeout_s=GUEST_S
        )
    finally:
        vm.vmm.put("vm.remove-device", {"id": "ruled"})


def test_the_api_makes_the_vmm_write_nowhere(vm: Booted) -> None:
    images = vm.folder / "images"
    vm.vmm.put("vm.pause")
    try:
        wanted = refusal(vm, "vm.snapshot", {"destination_url": f"file://{images}"})
        dumped = refusal(vm, "vm.coredump", {"destination_url": f"file://{images}/dump"})
    finally:
        vm.vmm.put("vm.resume")
    assert "Permission denied" in wanted
    assert "Permission denied" in dumped
    assert sorted(os.listdir(images)) == ["other", "own", "ruled"]


def test_a_guest_is_started_anew_within_its_vm(vm: Booted) -> None:
    vm.vmm.put("vm.shutdown")
    vm.vmm.put("vm.boot")
    vm.open_shell()
    vm.wait_ready()


@pytest.mark.long
def test_a_vm_lives_within_its_files_and_goes_on_from_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("swtpm") is None:
        pytest.skip("swtpm is missing")
    monkeypatch.setenv("PATH", os.pathsep.join([os.environ["PATH"], os.path.dirname(virtiofsd_program())]))
    own = tmp_path / "own"
    for name in ("shared", "tpm", "sockets", "snapshot"):
        (own / name).mkdir(parents=True)
    (own / "shared" / "word").write_text("hello")
    make_image(own / "pmem", 16 * MIB)
    shutil.copyfile(default_guest().disk, own / "disk")
    config = vm_config(
        **SHARED_MEMORY,
        disks=[{"path": f"{own}/disk"}],
        serial={"mode": "Socket", "socket": f"{own}/sockets/serial"},
        debug_console={"mode": "File", "file": f"{own}/debug"},
        landlock_enable=True,
        landlock_rules=[{"path": f"{own}/snapshot", "access": "rw"}],
    )
    helped = config | {
        "fs": [{"tag": "shared", "shared_dir": f"{own}/shared"}],
        "tpm": {"state_dir": f"{own}/tpm"},
        "pmem": [{"file": f"{own}/pmem"}],
        "vsock": {"cid": 7, "socket": f"{own}/sockets/vsock"},
    }
    with booting(tmp_path / "h", helped) as vm:
        vm.run("mount -t virtiofs shared /mnt")
        assert vm.run("cat /mnt/word") == "hello"
        assert vm.run("cat /sys/class/tpm/tpm0/tpm_version_major") == "2"
        vm.run("echo word > /mnt/back")
        assert vm.run("ls -d /dev/pmem0") == "/dev/pmem0"
    assert (own / "shared" / "back").read_text() == "word\n"
    with booting(tmp_path / "s", config) as vm:
        vm.vmm.put("vm.reboot")
        vm.wait_ready()
        vm.vmm.put("vm.pause")
        vm.vmm.put("vm.snapshot", {"destination_url": f"file://{own}/snapshot"})
    assert os.listdir(own / "sockets") == []
    with serving(tmp_path / "r") as vm:
        vm.vmm.put("vm.restore", {"source_url": f"file://{own}/snapshot", "resume": True})
        vm.open_shell()
        assert vm.run("echo there") == "there"
        make_image(own / "other", MIB)
        assert refusal(vm, "vm.add-disk", {"path": f"{own}/other"}).startswith("Permission denied")


@pytest.mark.long
def test_the_manager_that_takes_a_vm_over_holds_itself_too(tmp_path: Path) -> None:
    other = make_image(tmp_path / "other", MIB)
    with booting(
        tmp_path, vm_config(landlock_enable=True), "--no-shutdown", "--state-dir", str(tmp_path / "state")
    ) as vm:
        vm.server.kill()
        vm.server.restart()
        assert vm.run("echo there") == "there"
        assert "0" in marks_of(vm)  # who serves the API, since `--landlock` was not given
        assert "1" in marks_of(vm)
        assert refusal(vm, "vm.add-disk", {"path": str(other)}).startswith("Permission denied")
        vm.vmm.put("vm.reboot")
        vm.wait_ready()
        vm.vmm.put("vm.delete")
