"""File systems that guest and host share: what is written on either side, and what their back ends do.

One guest serves most tests; each of them leaves it as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.attack import Held, assert_holds_no_more, wait_gone
from support.booted import MIB, Booted, booting, serving, vm_config
from support.device.case import GUEST_S
from support.device.fs import SHARED_MEMORY, OwnFsCase, Virtiofsd, wait_driver
from support.leak import children_of
from support.shared import shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

CYCLES = [10, pytest.param(100, marks=pytest.mark.long)]
SIZE_BYTES = 8 * MIB


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnFsCase]:
    with contextlib.closing(OwnFsCase(tmp_path_factory.mktemp("fs"))) as made:
        yield made


@shared()
def shared_vm(case: OwnFsCase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    cpus = {"boot_vcpus": 2, "max_vcpus": 2}
    config = vm_config(cpus=cpus, fs=[case.device("cold")], **SHARED_MEMORY)
    with booting(tmp_path_factory.mktemp("run"), config) as booted:
        yield booted


@pytest.fixture
def virtiofsd(tmp_path: Path) -> Iterator[Virtiofsd]:
    """A back end of the user's own, its folder beside its socket."""
    (tmp_path / "shared").mkdir()
    with contextlib.closing(Virtiofsd(tmp_path / "fs.sock", tmp_path / "shared")) as daemon:
        yield daemon


@pytest.fixture
def as_before(vm: Booted) -> Iterator[None]:
    """Fail where the test leaves something in the VM, in QEMU, in the server or in the guest."""
    before, held, qemu = state(vm), Held(vm.server.pid), Held(vm.qemu_pid())
    yield
    wait_until(lambda: state(vm) == before, f"the VM is as it was: {before}", timeout_s=GUEST_S)
    assert_holds_no_more(vm.server.pid, held)
    assert_holds_no_more(vm.qemu_pid(), qemu)


def state(vm: Booted) -> dict[str, Any]:
    info = vm.info()
    return {
        "config": info["config"],
        "tree": sorted(info["device_tree"]),
        "guest": vm.run("ls /sys/bus/pci/devices"),
        "regions": guest_ram_regions(vm.qemu_pid()),
    }


def guest_ram_regions(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:")


def add(vm: Booted, **device: Any) -> tuple[str, str]:
    """Add a file system; return its id and address once its driver has it."""
    answer = vm.vmm.put("vm.add-fs", device, expect=200)
    wait_driver(vm, answer["bdf"])
    return answer["id"], answer["bdf"]


def remove(vm: Booted, device_id: str) -> None:
    count = vm.events.names().count("vm/device-removed")
    vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
    vm.events.wait("vm/device-removed", count=count + 1, timeout_s=GUEST_S)
    assert device_id not in vm.info()["device_tree"]


@contextlib.contextmanager
def mounted(vm: Booted, tag: str) -> Iterator[str]:
    vm.run(f"mkdir -p /tmp/{tag} && mount -t virtiofs {tag} /tmp/{tag}")
    yield f"/tmp/{tag}"
    vm.run(f"umount /tmp/{tag}")


def test_mebibytes_are_the_same_on_either_side(vm: Booted, case: OwnFsCase) -> None:
    content = os.urandom(SIZE_BYTES)
    (case.shared / "down").write_bytes(content)
    with mounted(vm, "tag-cold") as folder:
        told = vm.run(f"sha256sum <{folder}/down && cp {folder}/down {folder}/up && sync")
        assert told.split()[0] == hashlib.sha256(content).hexdigest()
        assert (case.shared / "up").read_bytes() == content
        vm.run(f"echo more >>{folder}/up")
        assert (case.shared / "up").read_bytes() == content + b"more\n"


def test_folders_permissions_links_and_names_are_the_same_on_either_side(vm: Booted, case: OwnFsCase) -> None:
    (case.shared / "host" / "deep").mkdir(parents=True)
    (case.shared / "host" / "deep" / "file").write_text("deep")
    (case.shared / "host" / "deep" / "file").chmod(0o640)
    (case.shared / "host" / "link").symlink_to("deep/file")
    os.mkfifo(case.shared / "host" / "fifo")
    with mounted(vm, "tag-cold") as folder:
        look = f"cd {folder}/host && stat -c %a deep/file && readlink link && cat link && test -p fifo"
        assert vm.run(look) == "640\ndeep/file\ndeep"
        vm.run(
            f"cd {folder} && mkdir -p guest/a/b && echo x >guest/a/b/c && chown 12:34 guest/a/b/c"
            " && chmod 4711 guest/a/b/c && ln -s a/b/c guest/link && ln guest/a/b/c guest/hard"
            " && mv guest/a/b/c guest/a/b/d && mv guest/a/b/d guest/a/b/c && rm -r host"
        )
        made = case.shared / "guest" / "a" / "b" / "c"
        status = made.stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o4711, 12, 34)
        assert status.st_ino == (case.shared / "guest" / "hard").stat().st_ino
        assert os.readlink(case.shared / "guest" / "link") == "a/b/c"
        assert not (case.shared / "host").exists()


@pytest.mark.usefixtures("as_before")
def test_file_system_of_a_back_end_at_a_socket_comes_and_goes(
    vm: Booted, virtiofsd: Virtiofsd, tmp_path: Path
) -> None:
    for turn in ("first", "second"):
        daemon = virtiofsd.start()
        device_id, _ = add(vm, id="hot", tag="hot", socket=str(virtiofsd.path), queue_size=256)
        (tmp_path / "shared" / "turn").write_text(turn)
        with mounted(vm, "hot") as folder:
            assert vm.run(f"cat {folder}/turn") == turn
        remove(vm, device_id)
        daemon.wait(GUEST_S)  # it ends with its connection


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("cycles", CYCLES)
def test_file_system_is_added_and_removed_over_and_over(vm: Booted, case: OwnFsCase, cycles: int) -> None:
    qemu, told = vm.qemu_pid(), len(vm.events.names())
    for turn in range(cycles):
        (case.shared / "turn").write_text(str(turn))
        device_id, _ = add(vm, tag="often", shared_dir=str(case.shared))
        with mounted(vm, "often") as folder:
            assert vm.run(f"cat {folder}/turn") == str(turn)
        remove(vm, device_id)
    assert vm.qemu_pid() == qemu
    assert "vm/device-helper-ended" not in vm.events.names()[told:]  # each ended with its device


@pytest.mark.usefixtures("as_before")
def test_more_queues_than_the_daemon_has_are_refused(vm: Booted, case: OwnFsCase) -> None:
    device = {"tag": "wide", "shared_dir": str(case.shared), "num_queues": 2}
    chain = vm.vmm.put("vm.add-fs", device, expect=500)
    assert chain[-2:] == ["Queue number  is not correct", "The back end has 2 queues, and 3 are needed"]


@pytest.mark.usefixtures("as_before")
def test_device_whose_back_end_died_unused_can_go(vm: Booted, virtiofsd: Virtiofsd) -> None:
    daemon = virtiofsd.start()
    device_id, _ = add(vm, tag="dead", socket=str(virtiofsd.path))
    daemon.kill()
    daemon.wait()
    remove(vm, device_id)


@pytest.mark.usefixtures("as_before")
def test_death_of_our_daemon_is_told_and_its_device_can_go(vm: Booted, case: OwnFsCase) -> None:
    before = children_of(vm.server.pid)
    device_id, _ = add(vm, tag="dead", shared_dir=str(case.shared))
    (daemon,) = children_of(vm.server.pid) - before
    os.kill(daemon, signal.SIGKILL)
    vm.events.wait("vm/device-helper-ended", timeout_s=GUEST_S)
    assert daemon not in children_of(vm.server.pid)  # as a zombie neither
    (told,) = (each for each in vm.events.documents() if each["event"] == "device-helper-ended")
    assert told["properties"]["id"] == device_id
    assert told["properties"]["reason"].startswith("virtiofsd was killed by signal 9 (SIGKILL)")
    remove(vm, device_id)


def test_death_of_a_back_end_in_use_leaves_the_guest_running_and_a_reboot_cures_it(
    vm: Booted, virtiofsd: Virtiofsd, case: OwnFsCase
) -> None:
    before = vm.config()
    daemon = virtiofsd.start()
    device_id, bdf = add(vm, tag="used", socket=str(virtiofsd.path))
    vm.run("mkdir -p /tmp/used && mount -t virtiofs used /tmp/used")
    daemon.kill()
    daemon.wait()
    vm.run("(ls /tmp/used; echo over >/tmp/over) >/dev/null 2>&1 &")
    assert vm.run("test -e /tmp/over || echo waits") == "waits"
    vm.vmm.put("vm.pause")
    vm.vmm.put("vm.resume")
    with mounted(vm, "tag-cold") as folder:  # the others work
        vm.run(f"echo alive >{folder}/alive")
    # The guest's driver waits for the answer that it will not get, and keeps the device.
    vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
    assert vm.run("echo goes on") == "goes on"
    assert f"_virtio-pci-{device_id}" in vm.info()["device_tree"]
    assert vm.config() == before

    vm.vmm.put("vm.reboot")
    vm.wait_ready()
    assert device_id not in vm.info()["device_tree"]
    assert bdf not in vm.run("ls /sys/bus/pci/devices")
    with mounted(vm, "tag-cold") as folder:
        assert vm.run(f"cat {folder}/alive") == "alive"


def no_file(path: Path, _: contextlib.ExitStack) -> None:
    assert not path.exists()


def folder(path: Path, _: contextlib.ExitStack) -> None:
    path.mkdir()


def plain_file(path: Path, _: contextlib.ExitStack) -> None:
    path.write_bytes(b"no socket")


def dead_socket(path: Path, _: contextlib.ExitStack) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def listening(path: Path, undo: contextlib.ExitStack) -> socket.socket:
    listener = undo.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(path))
    listener.listen()
    return listener


def unserved_socket(path: Path, undo: contextlib.ExitStack) -> None:
    listening(path, undo)


NOT_THERE: dict[str, tuple[Callable[[Path, contextlib.ExitStack], Any], list[str]]] = {
    "no file": (no_file, ["Connection to socket failed", "No such file or directory: {path} (os error 2)"]),
    "folder": (folder, ["Connection to socket failed", "Connection refused: {path} (os error 111)"]),
    "plain file": (plain_file, ["Connection to socket failed", "Connection refused: {path} (os error 111)"]),
    "dead socket": (
        dead_socket,
        ["Connection to socket failed", "Connection refused: {path} (os error 111)"],
    ),
    "unserved": (unserved_socket, ["Get features failed", "The back end did not answer within 5 s"]),
}
CHAINS = {
    "vm.add-fs": ["The fs could not be added to the VM", "Cannot create virtio-fs device"],
    "vm.add-generic-vhost-user": [
        "The generic vhost-user device could not be added to the VM",
        "Cannot create generic vhost-user device",
    ],
}
DEVICES = {
    "vm.add-fs": {"tag": "bad"},
    "vm.add-generic-vhost-user": {"device_type": 26, "queue_sizes": [64, 64]},
}


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    ("command", "name"),
    [*(("vm.add-fs", name) for name in NOT_THERE), ("vm.add-generic-vhost-user", "no file")],
)
def test_back_end_that_is_not_there_is_refused_with_the_reason(
    vm: Booted, tmp_path: Path, command: str, name: str
) -> None:
    make, words = NOT_THERE[name]
    path = tmp_path / "bad.sock"
    with contextlib.ExitStack() as undo:
        make(path, undo)
        device = {**DEVICES[command], "socket": str(path)}
        chain = vm.vmm.put(command, device, expect=500)
    first, second = CHAINS[command]
    said = [each.format(path=path) for each in words]
    assert chain == ["Error from API", first, "Error from device manager", second, *said]


@pytest.mark.parametrize("how", ["vm.shutdown", "vm.delete", "kill -9", "kill -9 of QEMU"])
def test_daemon_that_we_started_ends_with_its_vm(case: OwnFsCase, tmp_path: Path, how: str) -> None:
    with serving(tmp_path / "run", "--no-shutdown") as vm:
        vm.vmm.put("vm.create", vm_config(fs=[case.device("cold")], **SHARED_MEMORY))
        vm.vmm.put("vm.boot")
        started = [child for child in vm.server.children() if "virtiofsd" in child.command]
        assert started
        match how:
            case "kill -9":
                vm.server.keep("api")
                vm.server.kill()
            case "kill -9 of QEMU":
                os.kill(vm.qemu_pid(), signal.SIGKILL)
            case _:
                vm.vmm.put(how)
        for daemon in started:
            wait_gone(daemon, timeout_s=GUEST_S)


def test_folder_that_is_none_is_refused_and_the_vm_can_be_deleted(case: OwnFsCase, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with serving(tmp_path / "run") as vm:
        for path, words in (("file", "Not a directory"), ("none", "No such file or directory")):
            fs = {"tag": "t", "shared_dir": str(tmp_path / path)}
            vm.vmm.put("vm.create", vm_config(fs=[fs], **SHARED_MEMORY))
            chain = vm.vmm.put("vm.boot", expect=500)
            assert chain[-3:-1] == ["Cannot create virtio-fs device", "The shared folder could not be opened"]
            assert words in chain[-1]
            vm.vmm.put("vm.delete")
