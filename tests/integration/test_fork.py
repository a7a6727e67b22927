"""Clones of a guest that runs: each goes on alone, on its own disk, and no memory is changed by another."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, direct_boot, make_image, vm_config
from support.deadline import GUEST_S, HOST_S
from support.fork import CloneVm
from support.lock import is_locked
from support.process import descendants_of
from support.wait import wait_until

pytestmark = pytest.mark.qemu

FILLED_MIB = 8
IS_WHOLE = '[ "$(md5sum </tmp/filled)" = "$(cat /tmp/sum)" ]'


class Bed:
    """A guest with `/tmp/filled`, and `/tmp/sum` of it, in its memory, a balloon, virtio-mem and a disk."""

    def __init__(self, vm: Booted, folder: Path) -> None:
        self.vm = vm
        self.folder = folder
        self.image = folder / "disk.raw"
        self._clones = contextlib.ExitStack()

    def fork(self, **data: Any) -> list[CloneVm]:
        told = self.vm.vmm.put("vm.fork", {"directory": str(self.folder), **data}, expect=200)
        has_shell = data.get("resume", True)
        clones = [CloneVm(each, has_shell=has_shell) for each in told["clones"]]
        for clone in clones:
            self._clones.callback(clone.close)
        self.told = told
        return clones

    def close(self) -> None:
        self._clones.close()


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    folder = tmp_path_factory.mktemp("fork")
    config = vm_config(
        memory={"size": 192 * MIB, "hotplug_method": "VirtioMem", "hotplug_size": 128 * MIB},
        balloon={"size": 0, "free_page_reporting": True},
        net=[{"id": "net", "user": {}}],
        payload=direct_boot("memhp_default_state=online_movable"),
        disks=[
            {"id": "data", "path": str(make_image(folder / "disk.raw", 8 * MIB)), "image_type": "Raw"},
            {"id": "shared", "path": str(make_image(folder / "read.raw", MIB)), "image_type": "Raw",
             "readonly": True},
            {"id": "limited", "path": str(make_image(folder / "limited.raw", MIB)), "image_type": "Raw",
             "rate_limiter_config": {"bandwidth": {"size": 64 * MIB, "refill_time": 100}}},
        ],
    )  # fmt: skip
    with booting(folder / "run", config) as vm:
        vm.run(f"head -c {FILLED_MIB}m /dev/urandom >/tmp/filled; md5sum </tmp/filled >/tmp/sum")
        vm.vmm.put("vm.resize", {"desired_ram": 320 * MIB}, expect=204)
        wait_until(lambda: actual_bytes(vm) == 320 * MIB, "memory", timeout_s=GUEST_S)
        vm.run("echo parent >/tmp/name; printf before | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null")
        bed = Bed(vm, folder)
        try:
            yield bed
        finally:
            bed.close()


def digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def first_word(vm: Booted | CloneVm, device: str = "/dev/vda") -> str:
    return vm.run(f"dd if={device} bs=16 count=1 iflag=direct 2>/dev/null | tr -d '\\000'")


def actual_bytes(vm: Booted | CloneVm) -> int:
    size: int = vm.vmm.get("vm.info")["memory_actual_size"]
    return size


def mac_in(vm: Booted | CloneVm) -> str:
    """Return the address of the one network device as its guest has it, none where there is no device."""
    return vm.run("cat /sys/bus/virtio/drivers/virtio_net/virtio*/net/*/address 2>/dev/null || true")


def bases(vm: Booted) -> set[str]:
    """Return the copies of a guest's memory that QEMU processes of the server have, as paths to them."""
    found = {}
    for child in descendants_of(vm.server.pid):
        for fd in Path(f"/proc/{child.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "cloudvmm-base" in os.readlink(fd):
                    found[fd.stat().st_ino] = str(fd)
    return set(found.values())


def test_clones_go_on_by_themselves_and_cannot_change_each_other(bed: Bed) -> None:
    vm = bed.vm
    uptime = float(vm.run("cut -d' ' -f1 /proc/uptime"))
    one, two = bed.fork(count=2)
    frozen = digest(bed.image)
    kept = {path: digest(path) for path in bases(vm)}
    assert kept

    # Each is the same guest at the same moment, and has an identity of its own outside.
    assert {clone.run("cat /tmp/name") for clone in (one, two)} == {"parent"}
    assert all(float(clone.run("cut -d' ' -f1 /proc/uptime")) > uptime for clone in (one, two))
    configs = [vm.config(), one.config(), two.config()]
    paths = [config["disks"][0]["path"] for config in configs]
    assert len({str(bed.image), *paths}) == 4
    assert {config["disks"][1]["path"] for config in configs} == {str(bed.folder / "read.raw")}
    assert len({config["console"]["file"] for config in configs}) == 3

    # What one writes, to disk or memory, no other sees.
    for guest, word in ((vm, "parent"), (one, "one"), (two, "two")):
        assert first_word(guest) == "before"
        guest.run(
            f"printf {word}-own | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null; echo {word} >/tmp/name"
        )
    for guest, word in ((vm, "parent"), (one, "one"), (two, "two")):
        assert first_word(guest) == f"{word}-own"
        assert guest.run("cat /tmp/name") == word
    assert digest(bed.image) == frozen

    # What one gives back to the host, by balloon, as free pages or of virtio-mem, is lost to itself alone.
    one.run("rm /tmp/filled; sync; echo 3 >/proc/sys/vm/drop_caches")
    one.vmm.put("vm.resize", {"desired_balloon": 176 * MIB}, expect=204)
    wait_until(lambda: actual_bytes(one) <= (320 - 176) * MIB, "the balloon", timeout_s=GUEST_S)
    one.vmm.put("vm.resize", {"desired_balloon": 0}, expect=204)
    wait_until(lambda: actual_bytes(one) == 320 * MIB, "no balloon", timeout_s=GUEST_S)
    one.vmm.put("vm.resize", {"desired_ram": 192 * MIB}, expect=204)
    wait_until(lambda: actual_bytes(one) == 192 * MIB, "less memory", timeout_s=GUEST_S)
    for guest in (vm, two):
        guest.run(IS_WHOLE)
    assert {path: digest(path) for path in kept} == kept

    one.end()
    two.run(IS_WHOLE)
    two.end()
    vm.run(IS_WHOLE)
    wait_until(lambda: not bases(vm), "no memory of clones is left", timeout_s=HOST_S)


@pytest.mark.parametrize(
    ("clone", "status", "words"),
    [
        ({"api_socket": "/nowhere/api.sock"}, 500, "No such file or directory"),
        ({"overrides": {"cpus": {"boot_vcpus": 2}}}, 400, "'cpus' of a saved VM cannot be overridden"),
        # Its machine cannot be made, when the disks have been switched.
        ({"overrides": {"serial": {"mode": "File", "file": "/nowhere/log"}}}, 500, "No such file"),
    ],
)
def test_fork_that_fails_leaves_the_vm_as_it_was(
    bed: Bed, clone: dict[str, Any], status: int, words: str
) -> None:
    vm = bed.vm
    before = sorted(path.name for path in bed.folder.iterdir())
    disks = vm.config()["disks"]
    vm.run(f"printf status-{status} | dd of=/dev/vda conv=notrunc 2>/dev/null")
    texts = vm.vmm.put("vm.fork", {"directory": str(bed.folder), "clones": [{}, clone]}, expect=status)
    assert texts[1] == "The VM could not be forked"
    assert words in texts[-1]
    assert vm.config()["disks"] == disks
    assert sorted(path.name for path in bed.folder.iterdir()) == before
    vm.run(IS_WHOLE)
    assert first_word(vm) == f"status-{status}"
    wait_until(lambda: not bases(vm), "no memory of clones is left", timeout_s=HOST_S)


def test_clone_is_forked_with_what_it_has_written_itself(bed: Bed) -> None:
    (clone,) = bed.fork()
    kept = {path: digest(path) for path in bases(bed.vm)}
    clone.run("echo clone >/tmp/name; printf cloned-own | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null")
    told = clone.vmm.put("vm.fork", {"directory": clone.folder}, expect=200)
    with contextlib.closing(CloneVm(told["clones"][0])) as own:
        clone.run("echo later >/tmp/name")
        assert own.run("cat /tmp/name") == "clone"
        assert first_word(own) == "cloned-own"
        for guest in (own, clone, bed.vm):
            guest.run(IS_WHOLE)
        assert {path: digest(path) for path in kept} == kept
        clone.end()
        own.run(IS_WHOLE)
        own.end()
    wait_until(lambda: not bases(bed.vm), "no memory of clones is left", timeout_s=HOST_S)


def test_disk_that_was_split_goes_with_all_of_its_images(bed: Bed) -> None:
    (clone,) = bed.fork()
    clone.end()
    path = Path(bed.vm.config()["disks"][0]["path"])
    assert is_locked(path)
    bed.vm.vmm.put("vm.remove-device", {"id": "data"}, expect=204)
    bed.vm.events.wait("vm/device-removed", timeout_s=GUEST_S)
    for image in (path, bed.image):
        wait_until(lambda image=image: not is_locked(image), f"{image} is free", timeout_s=HOST_S)


def test_clone_s_guest_has_its_new_mac_once_it_has_another_device(bed: Bed) -> None:
    (clone,) = bed.fork()
    (net,) = clone.config()["net"]
    old_mac = bed.vm.config()["net"][0]["mac"]
    assert net["mac"] != old_mac
    assert mac_in(clone) == old_mac
    clone.vmm.put("vm.remove-device", {"id": "net"}, expect=204)
    wait_until(lambda: "net" not in clone.vmm.get("vm.info")["device_tree"], "it is gone", timeout_s=GUEST_S)
    clone.vmm.put("vm.add-net", {"id": "net", "mac": net["mac"], "user": {}}, expect=200)
    wait_until(lambda: mac_in(clone) == net["mac"], "the guest has the new address", timeout_s=GUEST_S)
    assert mac_in(bed.vm) == old_mac
    clone.end()
