"""Devices and their programs go on under the next manager: every kind that can, in one guest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, serving, vm_config
from support.deadline import HOST_S
from support.device.case import DeviceCase
from support.device.disk import DiskCase
from support.device.fs import FsCase, OwnFsCase
from support.device.net import NetCase
from support.device.net_user import NetUserCase
from support.device.net_vhost_user import NetVhostUserCase
from support.device.pmem import PmemCase
from support.device.vhost_user_disk import VhostUserDiskCase
from support.device.vsock import VsockCase
from support.namespace import network_namespace
from support.process import ProcessId, identify
from support.qemu import find_qemu
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

GOES_ON = (DiskCase, NetCase, NetUserCase, OwnFsCase, VsockCase, PmemCase)
# Who serves them is in the manager's own process, or was handed over to it.
CANNOT = (VhostUserDiskCase, NetVhostUserCase)


class Adopted:
    """A guest with a device of each kind, its manager about to be replaced, and its programs."""

    def __init__(self, vm: Booted, state: Path, cases: dict[str, DeviceCase]) -> None:
        self.vm = vm
        self._state = state
        self._cases = cases

    def check(self) -> None:
        """Fail unless each device does its work, seen from both sides."""
        tree = self.vm.info()["device_tree"]
        nodes = [node for node in tree.values() if "pci_bdf" in node]
        for device_id, case in self._cases.items():
            (bdf,) = (node["pci_bdf"] for node in nodes if device_id in node["children"])
            case.check(self.vm, device_id, bdf)

    def helpers(self) -> set[ProcessId]:
        numbers = [int(path.read_text().split()[0]) for path in self._state.glob("helper-*.pid")]
        return {who for who in map(identify, numbers) if who is not None and who.is_alive()}

    def replace_manager(self) -> None:
        self.vm.server.kill()
        self.vm.server.restart()

    def pcr(self) -> str:
        return self.vm.run("cat /sys/class/tpm/tpm0/pcr-sha256/0")


@contextlib.contextmanager
def adopting(folder: Path, qemu: str) -> Iterator[Adopted]:
    """A guest whose devices are there from its boot on, but for one file system, which is added later."""
    with network_namespace(), contextlib.ExitStack() as stack:
        cases: dict[str, DeviceCase] = {}
        changes: dict[str, Any] = {"tpm": {"state_dir": str(folder / "tpm")}}
        (folder / "tpm").mkdir()
        for kind in GOES_ON:
            home = folder / kind.name
            home.mkdir()
            case = stack.enter_context(contextlib.closing(kind(home)))
            cases[kind.name] = case
            changes |= case.changes
            device = case.device(kind.name)
            if case.is_single:
                changes[case.member] = device
            else:
                changes.setdefault(case.member, []).append(device)
        changes["memory"] = {"size": 256 * MIB, "shared": True, "hotplug_size": 256 * MIB}
        state = folder / "state"
        flags = ("--qemu", qemu, "--state-dir", str(state))
        with booting(folder / "run", vm_config(**changes), *flags) as vm:
            (folder / "late").mkdir()
            late = stack.enter_context(contextlib.closing(FsCase(folder / "late")))
            vm.vmm.put(late.command, late.device("late"))
            yield Adopted(vm, state, {**cases, "late": late})
            vm.vmm.put("vm.delete")


@pytest.mark.parametrize("version", ["path", pytest.param("7.2", marks=pytest.mark.long)])
def test_every_device_goes_on_with_its_program_and_ends_with_the_vm(version: str, tmp_path: Path) -> None:
    with adopting(tmp_path, find_qemu(version, tmp_path)) as adopted:
        programs, pcr = adopted.helpers(), adopted.pcr()
        adopted.replace_manager()

        assert adopted.helpers() == programs
        adopted.check()
        assert adopted.pcr() == pcr
        adopted.vm.vmm.put("vm.remove-device", {"id": "late"})
        adopted.replace_manager()
        assert adopted.helpers() == programs
        assert adopted.vm.vmm.get("vm.info")["state"] == "Running"
    assert len(programs) >= 3  # of the TPM, the file system and the vsock device; passt where it serves
    wait_until(lambda: not any(who.is_alive() for who in programs), "they have ended", timeout_s=HOST_S)


def test_device_that_would_be_lost_with_its_manager_is_refused(tmp_path: Path) -> None:
    with (
        network_namespace(),
        contextlib.ExitStack() as stack,
        serving(tmp_path / "run", "--state-dir", str(tmp_path / "state")) as vm,
    ):
        for kind in CANNOT:
            home = tmp_path / kind.name
            home.mkdir()
            case = stack.enter_context(contextlib.closing(kind(home)))
            vm.vmm.put("vm.create", vm_config(**case.changes, **{case.member: [case.device("lost")]}))
            answer = vm.vmm.put("vm.boot", expect=500)
            assert "the device lost, for a VM that outlives its manager" in answer[-1]
            assert vm.info()["state"] == "Created"
            vm.vmm.put("vm.delete")
