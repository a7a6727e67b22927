"""A guest moves from one server to another while it runs, seen from inside."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from support.booted import MIB, Booted, booting, make_image, serving, vm_config
from support.deadline import GUEST_S
from support.lock import is_locked
from support.qemu import find_qemu
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

WRITER = "while :; do dd if=/dev/urandom of=/tmp/busy bs=1M count=8 2>/dev/null; done & echo $! >/tmp/writer"


def receiving(vm: Booted, path: Path) -> Callable[[], None]:
    """Have `vm` wait for a VM at `path`; what is returned waits until it is there."""
    errors: list[BaseException] = []

    def receive() -> None:
        try:
            with vm.vmm.second() as other:
                other.put("vm.receive-migration", {"receiver_url": f"unix:{path}"}, expect=204)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    wait_until(path.exists, "the receiver listens", timeout_s=GUEST_S)

    def finish() -> None:
        thread.join(GUEST_S)
        assert not thread.is_alive()
        if errors:
            raise errors[0]

    return finish


def send(vm: Booted, path: Path, **data: object) -> None:
    vm.vmm.put("vm.send-migration", {"destination_url": f"unix:{path}", **data}, expect=204)


def uptime(vm: Booted) -> float:
    return float(vm.run("cat /proc/uptime").split()[0])


@pytest.mark.parametrize("version", ["path", "7.2"])
def test_guest_that_works_goes_on_in_the_other_server(tmp_path: Path, version: str) -> None:
    disk, added = make_image(tmp_path / "disk", 4 * MIB), make_image(tmp_path / "added", 4 * MIB)
    flags = ("--qemu", find_qemu(version, tmp_path))
    config = vm_config(
        cpus={"boot_vcpus": 1, "max_vcpus": 2}, disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}]
    )
    path = tmp_path / "socket"
    with (
        booting(tmp_path / "first", config, *flags) as source,
        serving(tmp_path / "second", *flags) as target,
    ):
        source.vmm.put("vm.add-disk", {"id": "added", "path": str(added), "image_type": "Raw"}, expect=200)
        source.run("head -c 40m /dev/urandom >/tmp/filled; md5sum </tmp/filled >/tmp/sum")
        source.run("until [ -e /dev/vdb ]; do usleep 10000; done; echo before | dd of=/dev/vdb conv=fsync")
        source.run(WRITER)
        before = uptime(source)
        finish = receiving(target, path)

        send(source, path)

        finish()
        source.events.wait("vm/migration-finished", timeout_s=GUEST_S)
        assert "vm/migration-memory-iteration" in source.events.names()
        wait_ended(source)
        assert target.info()["state"] == "Running"
        target.open_shell()
        target.run("kill -0 $(cat /tmp/writer) && kill $(cat /tmp/writer)", timeout_s=GUEST_S)
        assert target.run("md5sum </tmp/filled") == target.run("cat /tmp/sum")
        assert before < uptime(target) < before + 120
        assert target.run("head -c 6 /dev/vdb") == "before"
        target.run("echo after | dd of=/dev/vdb conv=fsync")
        assert added.read_bytes()[:5] == b"after"
        assert is_locked(disk)
        target.vmm.put("vm.remove-device", {"id": "added"}, expect=204)
        target.events.wait("vm/device-removed", timeout_s=GUEST_S)
        target.vmm.put("vm.reboot")
        target.wait_ready()


def wait_ended(vm: Booted) -> None:
    """Wait until the server whose guest has left is gone."""
    folder = Path(f"/proc/{vm.server.pid}/exe")
    wait_until(
        lambda: not os.path.lexists(folder) or not os.access(folder, os.F_OK), "its end", timeout_s=GUEST_S
    )


def test_source_is_kept_paused_and_can_be_thrown_away(tmp_path: Path) -> None:
    path, image = tmp_path / "socket", make_image(tmp_path / "disk", MIB)
    config = vm_config(
        memory={"size": 256 * MIB, "shared": True},
        disks=[{"id": "d", "path": str(image), "image_type": "Raw"}],
    )
    with serving(tmp_path / "second") as target, booting(tmp_path / "first", config) as source:
        finish = receiving(target, path)
        send(source, path, local=True, preserve_source=True)
        finish()
        source.events.wait("vm/migration-finished", timeout_s=GUEST_S)
        assert source.info()["state"] == "Paused"
        words = source.vmm.put("vm.resume", expect=500)
        assert "Cannot lock images of all block devices" in words
        source.vmm.put("vm.delete")
        assert is_locked(image)
        target.open_shell()
        assert target.run("echo here") == "here"


def test_guest_runs_on_where_its_receiver_dies_or_refuses(tmp_path: Path) -> None:
    """Killed while the memory is on its way, and an image that the receiver cannot open."""
    path, image = tmp_path / "socket", make_image(tmp_path / "disk", MIB)
    config = vm_config(disks=[{"id": "d", "path": str(image), "image_type": "Raw"}])
    with booting(tmp_path / "first", config) as source:
        source.run("head -c 60m /dev/urandom >/tmp/filled")
        with serving(tmp_path / "second") as target:
            finish = receiving(target, path)
            send(source, path)
            target.events.wait("vm/migration-receive-started", timeout_s=GUEST_S)
            (qemu,) = wait_until(
                lambda: [child for child in target.server.children() if "qemu-system" in child.command],
                "the receiver's QEMU",
                timeout_s=GUEST_S,
            )
            os.kill(qemu.pid, signal.SIGKILL)
            with pytest.raises(AssertionError, match="500"):
                finish()
            source.events.wait("vm/migration-failed", timeout_s=GUEST_S)
            assert source.info()["state"] == "Running"
            assert source.run("echo here") == "here"
            assert is_locked(image)
            source.run("echo still | dd of=/dev/vda conv=fsync")
            assert image.read_bytes()[:5] == b"still"
            finish = receiving(target, path)
            send(source, path)
            finish()
            target.open_shell()
            assert target.run("head -c 5 /dev/vda") == "still"


@pytest.mark.long
def test_memory_in_a_file_that_the_source_has_is_left_alone(tmp_path: Path) -> None:
    """On one host the destination would empty the file that the guest runs on."""
    path, file = tmp_path / "socket", make_image(tmp_path / "ram", 256 * MIB)
    zones = [{"id": "z", "size": 256 * MIB, "file": str(file), "shared": True}]
    config = vm_config(memory={"size": 0, "zones": zones})
    with booting(tmp_path / "first", config) as source, serving(tmp_path / "second") as target:
        source.run("head -c 40m /dev/urandom >/tmp/filled; md5sum </tmp/filled >/tmp/sum")
        finish = receiving(target, path)
        send(source, path)
        with pytest.raises(AssertionError, match="is the memory of another VM"):
            finish()
        source.events.wait("vm/migration-failed", timeout_s=GUEST_S)
        assert source.run("md5sum </tmp/filled") == source.run("cat /tmp/sum")

        finish = receiving(target, path)
        send(source, path, local=True)
        finish()
        target.open_shell()
        assert target.run("md5sum </tmp/filled") == target.run("cat /tmp/sum")
