"""Persistent memory: what the guest writes and where it ends up, and what cannot be persistent memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, make_image, serving, vm_config
from support.deadline import HOST_S
from support.device.pmem import block_name
from support.id_map import check_id_maps
from support.shared import shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

BYTES = 4 * MIB
ROOM_BYTES = 64 << 30  # for what is added later


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pmem")


@shared()
def shared_vm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest with persistent memory of each form."""
    pmem = [
        {"id": "kept", "file": filled(folder / "kept.img")},
        {"id": "private", "file": filled(folder / "private.img"), "discard_writes": True},
        {"id": "unnamed", "file": str(folder), "size": BYTES},
        {"id": "part", "file": filled(folder / "part.img"), "size": 2 * MIB, "pci_device_id": 21},
    ]
    with booting(tmp_path_factory.mktemp("run"), vm_config(pmem=pmem)) as booted:
        yield booted


def filled(path: Path, size_bytes: int = BYTES) -> str:
    path.write_bytes(b"host".ljust(size_bytes, b"\0"))
    return str(path)


def bdf(vm: Booted, device_id: str) -> str:
    return str(vm.info()["device_tree"][f"_virtio-pci-{device_id}"]["pci_bdf"])


def write_in_guest(vm: Booted, device_id: str, text: str) -> str:
    """Write `text` to the device, flush it, and read back what the guest then has there."""
    device = f"/dev/{block_name(vm, bdf(vm, device_id))}"
    vm.run(f"printf {text} | dd of={device} bs=4096 conv=sync,fsync 2>/dev/null")
    vm.run("echo 3 >/proc/sys/vm/drop_caches")
    return vm.run(f"head -c {len(text)} {device}")


def test_what_the_guest_flushes_is_in_the_file(vm: Booted, folder: Path) -> None:
    assert write_in_guest(vm, "kept", "guest") == "guest"
    assert (folder / "kept.img").read_bytes() == b"guest".ljust(BYTES, b"\0")


def test_discarded_writes_are_seen_by_the_guest_alone(vm: Booted, folder: Path) -> None:
    assert write_in_guest(vm, "private", "guest") == "guest"
    assert (folder / "private.img").read_bytes() == b"host".ljust(BYTES, b"\0")


def test_folder_gives_a_file_without_a_name(vm: Booted, folder: Path) -> None:
    before = sorted(folder.iterdir())
    assert write_in_guest(vm, "unnamed", "guest") == "guest"
    assert sorted(folder.iterdir()) == before
    name = block_name(vm, bdf(vm, "unnamed"))
    assert vm.run(f"cat /sys/block/{name}/size") == str(BYTES // 512)


def test_size_shows_a_part_of_the_file_on_the_slot_that_was_asked_for(vm: Booted) -> None:
    assert bdf(vm, "part") == "0000:00:15.0"
    name = block_name(vm, bdf(vm, "part"))
    assert vm.run(f"cat /sys/block/{name}/size") == str(2 * MIB // 512)


def test_file_system_outlives_the_guest_that_made_it(vm: Booted, folder: Path) -> None:
    image = make_image(folder / "fs.img", 16 * MIB)
    subprocess.run(["/sbin/mkfs.ext4", "-q", str(image)], check=True, timeout=HOST_S)
    device = vm.vmm.put("vm.add-pmem", {"file": str(image)}, expect=200)
    name = block_name(vm, device["bdf"])
    vm.run(f"mount -t ext4 /dev/{name} /mnt && echo kept >/mnt/file")
    vm.run("umount /mnt")
    vm.vmm.put("vm.reboot")
    vm.wait_ready()
    name = block_name(vm, bdf(vm, device["id"]))
    assert vm.run(f"mount -t ext4 /dev/{name} /mnt && cat /mnt/file && umount /mnt") == "kept"


def test_private_memory_is_added_from_a_file_that_the_user_of_qemu_may_only_read(
    vm: Booted, tmp_path: Path
) -> None:
    image = Path(filled(tmp_path / "readable.img"))
    image.chmod(0o644)
    device = vm.vmm.put("vm.add-pmem", {"file": str(image), "discard_writes": True}, expect=200)
    assert write_in_guest(vm, device["id"], "guest") == "guest"
    assert image.read_bytes() == b"host".ljust(BYTES, b"\0")


def missing(folder: Path) -> dict[str, Any]:
    return {"file": str(folder / "missing.img")}


def folder_without_size(folder: Path) -> dict[str, Any]:
    return {"file": str(folder)}


def folder_with_discarded_writes(folder: Path) -> dict[str, Any]:
    return {"file": str(folder), "size": BYTES, "discard_writes": True}


def odd_size(folder: Path) -> dict[str, Any]:
    return {"file": filled(folder / "odd.img", 3 * MIB)}


def empty(folder: Path) -> dict[str, Any]:
    return {"file": str(make_image(folder / "empty.img", 0))}


def too_short(folder: Path) -> dict[str, Any]:
    return {"file": str(make_image(folder / "short.img", BYTES)), "size": 2 * BYTES}


def pipe(folder: Path) -> dict[str, Any]:
    os.mkfifo(folder / "pipe")
    return {"file": str(folder / "pipe"), "size": BYTES}


def larger_than_the_room(folder: Path) -> dict[str, Any]:
    return {"file": str(make_image(folder / "large.img", 2 * ROOM_BYTES))}


REFUSALS: list[tuple[Callable[[Path], dict[str, Any]], list[str]]] = [
    (missing, ["Cannot open persistent memory file", "No such file or directory"]),
    (folder_without_size, ["Trying to use a directory for pmem but no size specified"]),
    (folder_with_discarded_writes, ["Cannot open persistent memory file", "Invalid argument"]),
    (odd_size, ["Trying to use a size that is not multiple of 2MiB"]),
    (empty, ["The file is empty, and no size was given"]),
    (too_short, [f"The file has {BYTES} bytes, and the guest is to see {2 * BYTES} of it"]),
    (pipe, ["It is neither a file nor a disk", "Illegal seek"]),
    (larger_than_the_room, ["not enough space"]),
]


@pytest.mark.parametrize(("make", "words"), REFUSALS, ids=[make.__name__ for make, _ in REFUSALS])
def test_what_cannot_be_persistent_memory_is_refused_with_the_reason(
    vm: Booted, tmp_path: Path, make: Callable[[Path], dict[str, Any]], words: list[str]
) -> None:
    before, held = vm.info(), open_files(vm)
    answer = vm.vmm.put("vm.add-pmem", make(tmp_path), expect=500)
    assert all(word in text for word, text in zip(words, answer[-len(words) :], strict=True)), answer
    assert (vm.info()["config"], set(vm.info()["device_tree"])) == (
        before["config"],
        set(before["device_tree"]),
    )
    # QEMU unmaps a moment later.
    wait_until(lambda: open_files(vm) == held, "nothing more is open", timeout_s=HOST_S)


def open_files(vm: Booted) -> list[str]:
    """Return the files that server and QEMU have open; sockets and such come and go by themselves."""
    found = []
    for pid in (vm.server.pid, vm.qemu_pid()):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(str(fd.readlink()))
    return sorted(path for path in found if path.startswith("/"))


def test_small_guest_without_room_keeps_its_memory_and_is_refused_more(tmp_path: Path) -> None:
    check_id_maps(tmp_path)
    with booting(tmp_path, vm_config()) as vm:
        assert "SWIOTLB" not in vm.run("dmesg")
        answer = vm.vmm.put("vm.add-pmem", {"file": filled(tmp_path / "one.img")}, expect=500)
        assert "boot it with memory.hotplug_size or with a pmem device" in answer[-2]
        assert vm.config().get("pmem") is None


@pytest.fixture
def mapless(tmp_path: Path) -> Iterator[Path]:
    """A folder of a file system whose files cannot be shown as another user's."""
    if os.geteuid() != 0:
        pytest.skip("Mounting needs root")
    folder = tmp_path / "mapless"
    folder.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.root
def test_file_that_cannot_be_shown_to_the_user_of_qemu_is_refused_with_what_helps(
    tmp_path: Path, mapless: Path
) -> None:
    config = vm_config(memory={"size": 256 * MIB, "hotplug_size": 256 * MIB})
    device = {"file": filled(mapless / "one.img")}
    with booting(tmp_path, config) as vm:
        answer = vm.vmm.put("vm.add-pmem", device, expect=500)
        assert answer[-2].startswith("QEMU's user may not open it: name it in landlock_rules first")
        assert answer[-1].endswith("Permission denied")
        assert vm.config().get("pmem") is None
    rules = {"landlock_enable": True, "landlock_rules": [{"path": device["file"], "access": "rw"}]}
    for name, more, flags in (("named", rules, []), ("root", {}, ["--qemu-user", "root"])):
        (tmp_path / name).mkdir()
        with booting(tmp_path / name, config | more, *flags) as vm:
            vm.vmm.put("vm.add-pmem", device, expect=200)


def test_file_that_cannot_be_had_is_told_at_the_boot(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        short = {"file": str(make_image(tmp_path / "short.img", BYTES)), "size": 2 * BYTES}
        server.vmm.put("vm.create", vm_config(pmem=[short]))
        assert "the guest is to see" in server.vmm.put("vm.boot", expect=500)[-1]


def test_room_for_hotplug_takes_persistent_memory(tmp_path: Path) -> None:
    check_id_maps(tmp_path)
    memory = {"size": 256 * MIB, "hotplug_size": 256 * MIB}
    with booting(tmp_path, vm_config(memory=memory)) as vm:
        device = vm.vmm.put("vm.add-pmem", {"file": filled(tmp_path / "one.img")}, expect=200)
        assert vm.run(f"head -c 4 /dev/{block_name(vm, device['bdf'])}") == "host"
