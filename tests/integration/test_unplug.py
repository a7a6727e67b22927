"""Asking for a device and waiting: a guest that lets go, one that is paused, one that takes no notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.client import Client
from support.booted import MIB, Booted, booting, direct_boot, make_image, vm_config
from support.deadline import GUEST_S

pytestmark = [pytest.mark.qemu]

SHORT_S = 0.5


def two_disks(folder: Path, *words: str) -> dict[str, Any]:
    """Return the config of a VM with the disks "one" and "two", and `words` on its kernel's command line."""
    folder.mkdir(exist_ok=True)
    images = [make_image(folder / name, 4 * MIB) for name in ("one", "two")]
    disks = [{"id": image.name, "path": str(image), "image_type": "Raw"} for image in images]
    return vm_config(disks=disks, payload=direct_boot(*words))


def configured(vm: Booted) -> list[str]:
    return [disk["id"] for disk in vm.config()["disks"]]


def remote(vm: Booted, *words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "cloudvmm.cli.remote.main", "--api-socket", vm.server.socket_path]
    return subprocess.run(
        [*program, *words], capture_output=True, text=True, timeout=GUEST_S * 2, check=False
    )


def test_guest_that_runs_lets_go_and_a_paused_one_when_it_is_resumed(tmp_path: Path) -> None:
    with (
        booting(tmp_path / "vm", two_disks(tmp_path / "images")) as vm,
        Client(vm.server.socket_path) as client,
    ):
        client.remove_device("one", GUEST_S)
        assert vm.run("ls /sys/block") == "vdb"
        assert "one" not in vm.info()["device_tree"]

        client.vm_pause()
        with pytest.raises(TimeoutError, match=r"device two after 0\.5 s; the VM is paused$"):
            client.remove_device("two", SHORT_S)
        assert (configured(vm), "two" in vm.info()["device_tree"]) == ([], True)
        client.vm_resume()
        vm.events.wait("vm/device-removed", count=2, timeout_s=GUEST_S)
        assert vm.run("ls /sys/block") == ""


def test_guest_that_takes_no_notice_keeps_the_device_until_it_is_rebooted(tmp_path: Path) -> None:
    config = two_disks(tmp_path / "images", "acpiphp.disable=1")
    with booting(tmp_path / "vm", config) as vm, Client(vm.server.socket_path) as client:
        for _ in range(2):  # asking again is allowed, and changes nothing
            with pytest.raises(TimeoutError, match=r"has not let go of the device one after 0\.5 s$"):
                client.remove_device("one", SHORT_S)
        outcome = remote(vm, "remove-device", "one", "--wait", str(SHORT_S))
        assert (outcome.returncode, outcome.stdout) == (1, "")
        assert outcome.stderr.endswith("  The guest has not let go of the device one after 0.5 s\n")

        assert (configured(vm), "one" in vm.info()["device_tree"]) == (["two"], True)
        assert vm.run("ls /sys/block; head -c 4 /dev/vda | tr '\\0' 0") == "vda\nvdb\n0000"
        vm.vmm.put("vm.reboot")
        vm.wait_ready()
        assert vm.run("ls /sys/block") == "vda"
        assert "one" not in vm.info()["device_tree"]
        assert "vm/device-removed" not in vm.events.names()


def test_two_that_are_asked_for_at_once_are_gone_behind_a_shutdown(tmp_path: Path) -> None:
    images = tmp_path / "images"
    with booting(tmp_path / "vm", two_disks(images)) as vm:
        vm.vmm.put("vm.pause")
        for name in ("one", "two", "one"):
            vm.vmm.put("vm.remove-device", {"id": name}, expect=204)
        again = {"id": "one", "path": str(images / "one"), "image_type": "Raw"}
        refusal = vm.vmm.put("vm.add-disk", again, expect=500)
        assert refusal[-1] == "Invalid identifier as it is not unique: one"
        assert (configured(vm), {"one", "two"} <= vm.info()["device_tree"].keys()) == ([], True)

        vm.vmm.put("vm.shutdown")
        vm.vmm.put("vm.boot")
        vm.open_shell()
        vm.wait_ready()
        assert vm.run("ls /sys/block") == ""
        assert {"one", "two"}.isdisjoint(vm.info()["device_tree"])
        vm.vmm.put("vm.add-disk", again, expect=200)
        vm.run("until test -e /dev/vda; do usleep 20000; done", timeout_s=GUEST_S)
        assert "vm/device-removed" not in vm.events.names()
