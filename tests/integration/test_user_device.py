"""vfio-user devices: back ends that are missing, die or lie, and a QEMU that has no such devices."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, serving, vm_config
from support.device.case import GUEST_S, pci_folder
from support.device.user_device import UserDeviceCase
from support.qemu import find_qemu, version_of
from support.shared import shared
from support.vfio_user import Fault, VfioUserServer
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

ADD = "The user device could not be added to the VM"
MANAGER = "Error from device manager"
SHARED = {"size": 256 * MIB, "shared": True}

Make = Callable[[Path, contextlib.ExitStack], None]


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    folder = tmp_path_factory.mktemp("user")
    qemu = find_qemu("newest", folder)
    with booting(folder, vm_config(memory=SHARED), "--qemu", qemu) as booted:
        yield booted


def state(vm: Booted) -> dict[str, Any]:
    """Return all that a failed addition must leave as it was, in the VM and in the guest, which answers."""
    info = vm.info()
    return {
        "config": {name: value for name, value in info["config"].items() if value != []},
        "tree": sorted(info["device_tree"]),
        "guest": vm.run("ls /sys/bus/pci/devices"),
        "qemu": vm.qemu_pid(),
    }


def missing(path: Path, cleanup: contextlib.ExitStack) -> None:
    assert not path.exists()


def a_file(path: Path, cleanup: contextlib.ExitStack) -> None:
    path.write_bytes(b"")


def a_folder(path: Path, cleanup: contextlib.ExitStack) -> None:
    path.mkdir()


def dead(path: Path, cleanup: contextlib.ExitStack) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def faulty(fault: Fault) -> Make:
    def serve(path: Path, cleanup: contextlib.ExitStack) -> None:
        cleanup.enter_context(contextlib.closing(VfioUserServer(path, fault)))

    return serve


# Each with words of the last sentence of the answer. A server that takes the connection only to close it
# is not among them: where its timing is bad it brings QEMU 11.1 down (docs/compatibility.md).
BAD_BACK_ENDS = [
    pytest.param(missing, "No such file or directory", id="missing"),
    pytest.param(a_file, "is not a socket", id="file"),
    pytest.param(a_folder, "is not a socket", id="folder"),
    pytest.param(dead, "Connection refused", id="dead-socket"),
    pytest.param(faulty(Fault.OLD_VERSION), "incompatible server version", id="other-version"),
    pytest.param(faulty(Fault.NO_JSON), "malformed capabilities", id="no-json"),
    pytest.param(faulty(Fault.NO_REGIONS), "failed to get region 0 info", id="no-regions"),
    pytest.param(faulty(Fault.SILENT), "timed out waiting for reply", id="silent"),
]


@pytest.mark.parametrize(("make", "words"), BAD_BACK_ENDS)
def test_bad_back_end_is_told_and_nothing_changes(vm: Booted, tmp_path: Path, make: Make, words: str) -> None:
    before = state(vm)
    path = tmp_path / "device.sock"
    with contextlib.ExitStack() as cleanup:
        make(path, cleanup)
        answer = vm.vmm.put("vm.add-user-device", {"id": "bad", "socket": str(path)}, expect=500)
    assert answer[:3] == ["Error from API", ADD, MANAGER]
    assert words in answer[-1]
    assert state(vm) == before


def test_bad_back_end_refuses_the_boot_and_a_good_one_at_the_same_place_is_taken(tmp_path: Path) -> None:
    qemu = find_qemu("newest", tmp_path)
    path = tmp_path / "device.sock"
    with serving(tmp_path / "run", "--qemu", qemu) as server:
        config = vm_config(memory=SHARED, user_devices=[{"id": "one", "socket": str(path)}])
        server.vmm.put("vm.create", config)
        for fault in (None, Fault.CLOSES, Fault.OLD_VERSION):
            with contextlib.ExitStack() as cleanup:
                if fault is not None:
                    faulty(fault)(path, cleanup)
                answer = server.vmm.put("vm.boot", expect=500)
            assert answer[:2] == ["Error from API", "The VM could not boot"]
            assert server.info()["state"] == "Created"
            path.unlink(missing_ok=True)
        with contextlib.closing(VfioUserServer(path)) as good:
            server.vmm.put("vm.boot")
            assert good.clients == 1
            assert "one" in server.info()["device_tree"]
            server.vmm.put("vm.shutdown")


def test_guest_outlives_a_server_that_dies_and_the_device_can_be_removed(vm: Booted, tmp_path: Path) -> None:
    before = state(vm)
    server = VfioUserServer(tmp_path / "device.sock")
    answer = vm.vmm.put("vm.add-user-device", {"id": "mortal", "socket": str(server.path)}, expect=200)
    folder = pci_folder(answer["bdf"])
    vm.run(
        f"until test -e {folder}/enable; do usleep 20000; done; echo 1 >{folder}/enable", timeout_s=GUEST_S
    )
    address = int(vm.run(f"head -n 1 {folder}/resource").split()[0], 16)

    server.close()

    assert vm.run(f"devmem {address:#x} 32") == "0xFFFFFFFF"
    vm.vmm.put("vm.remove-device", {"id": "mortal"}, expect=204)
    wait_until(lambda: state(vm) == before, "the VM is as before", timeout_s=GUEST_S)


def test_second_device_at_one_socket_is_refused(vm: Booted, tmp_path: Path) -> None:
    with contextlib.closing(VfioUserServer(tmp_path / "device.sock")) as server:
        vm.vmm.put("vm.add-user-device", {"id": "first", "socket": str(server.path)}, expect=200)
        answer = vm.vmm.put("vm.add-user-device", {"id": "second", "socket": str(server.path)}, expect=500)
        assert answer[-1] == f'VFIO-user socket path already in use: "{server.path}"'
        assert server.clients == 1
        vm.vmm.put("vm.remove-device", {"id": "first"}, expect=204)
        wait_until(lambda: "first" not in vm.info()["device_tree"], "it is gone", timeout_s=GUEST_S)


def test_memory_that_is_not_shared_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "run") as server:
        server.vmm.put("vm.create", vm_config(user_devices=[{"socket": "/nowhere"}]))
        assert "Using user devices requires using shared memory or huge pages" in server.vmm.put(
            "vm.boot", expect=400
        )


@pytest.mark.parametrize("version", ["path", "7.2"])
def test_qemu_without_such_devices_is_named_in_the_refusal(tmp_path: Path, version: str) -> None:
    qemu = find_qemu(version, tmp_path)
    if version_of(qemu) >= UserDeviceCase.oldest:
        pytest.skip("This QEMU has vfio-user devices")
    words = [UserDeviceCase.refusal, f"is QEMU {'.'.join(map(str, version_of(qemu)))}"]
    with (
        contextlib.closing(VfioUserServer(tmp_path / "device.sock")) as good,
        serving(tmp_path / "run", "--qemu", qemu) as server,
    ):
        device = {"socket": str(good.path)}
        server.vmm.put("vm.create", vm_config(memory=SHARED, user_devices=[device]))
        answer = server.vmm.put("vm.boot", expect=500)
        assert [word for word in words if word not in answer[-1]] == []
        server.vmm.put("vm.delete")
        server.vmm.put("vm.create", vm_config(memory=SHARED))
        server.vmm.put("vm.boot")
        answer = server.vmm.put("vm.add-user-device", device, expect=500)
        assert [word for word in words if word not in answer[-1]] == []
        assert "user_devices" not in server.config()
        assert good.clients == 0
