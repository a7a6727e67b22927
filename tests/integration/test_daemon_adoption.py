"""A daemon that is killed is followed by another, and none of its guests notices."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cloudvmm.api.data import HeldState, HeldVmm
from cloudvmm.api.fleet import VmmsCreateData, VmmsDeleteData
from cloudvmm.client import DaemonClient
from cloudvmm.config.vm import VmConfig
from cloudvmm.errors import VmmError
from support.attack import spend
from support.daemon import Daemon
from support.deadline import GUEST_S, HOST_S
from support.process import ProcessId, descendants_of
from support.server import process_of
from support.survivor import qemus_about
from support.vm import Guest, choose_engine, small_config
from support.vmm import Vmm
from support.wait import wait_until

pytestmark = pytest.mark.qemu

NAMES = ("one", "other")
SEED = 3
LAST_MOMENT_S = 0.5


class Fleet:
    """A daemon with a folder `state`, and guests in it. Owns the connections to their VMMs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.state = home / "state"
        self._engine = choose_engine("qemu")
        self._vmms: dict[str, Vmm] = {}
        self.daemon = Daemon(home / "d", [*self._engine.flags, "--state-dir", str(self.state)])
        self.daemon.wait_ready()

    def make(self, name: str) -> None:
        """Make a VMM, and boot a VM."""
        (self.home / name).mkdir()
        held = self.daemon.client.vmms_create(VmmsCreateData(id=name))
        self._vmms[name] = vmm = Vmm(held.api_socket)
        vmm.put("vm.create", small_config(self._engine, self.home / name))
        vmm.put("vm.boot")

    def guest(self, name: str) -> Guest:
        return Guest(self._vmms[name], self._engine)

    def put(self, name: str, command: str) -> None:
        self._vmms[name].put(command)

    def qemu(self, name: str) -> ProcessId:
        """Return the QEMU of the VM, as its folder names it."""
        return process_of(int((self.state / "vms" / name / "pid").read_text().split()[0]))

    def vmms(self) -> dict[str, HeldVmm]:
        return {vmm.id: vmm for vmm in self.daemon.client.vmms_list().vmms}

    def states(self) -> dict[str, str | None]:
        found = self.vmms().values()
        return {vmm.id: None if vmm.vm_state is None else vmm.vm_state.value for vmm in found}

    def strike(self, name: str, moment_s: float) -> None:
        """Kill the daemon while a VMM is made, or its VM, or while it is ended; start another."""
        state = self.states()[name] if name in self.vmms() else "none"
        thread = threading.Thread(target=self._take_next_step, args=(name, state))
        thread.start()
        spend(moment_s, unless=lambda: not thread.is_alive())
        self.daemon.kill()
        thread.join(HOST_S)
        self.daemon.restart()

    def _take_next_step(self, name: str, state: str | None) -> None:
        """Ask for what comes next in the life of a VMM, which may fail."""
        with contextlib.suppress(VmmError, OSError), contextlib.ExitStack() as stack:
            daemon = stack.enter_context(DaemonClient(self.daemon.path, timeout_s=HOST_S))
            if state == "none":
                daemon.vmms_create(VmmsCreateData(id=name))
            elif state in ("Running", "Paused"):
                daemon.vmms_delete(VmmsDeleteData(id=name))
            else:
                (self.home / name).mkdir(exist_ok=True)
                vm = stack.enter_context(self.daemon.vm(name))
                if state is None:
                    vm.vm_create(msgspec.convert(small_config(self._engine, self.home / name), VmConfig))
                vm.vm_boot()

    def is_whole(self) -> bool:
        """Say whether each QEMU is that of a VM, each VM that runs has one, and each VMM a folder."""
        running = {name for name, state in self.states().items() if state in ("Running", "Paused")}
        known = sorted(self.qemu(name).pid for name in running)
        found = sorted(qemus_about(self.home))
        return known == found and set(os.listdir(self.state / "vms")) == self.vmms().keys()

    def kill_daemon(self) -> None:
        self.close()
        self.daemon.kill()

    def close(self) -> None:
        """Each connection is opened anew where it is needed."""
        for vmm in self._vmms.values():
            vmm.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    found = Fleet(tmp_path)
    yield found
    qemus = {qemu for name in found.vmms() for qemu in running(found, name)}
    found.close()
    found.daemon.check_end()
    assert not any(qemu.is_alive() for qemu in qemus)


def running(fleet: Fleet, name: str) -> list[ProcessId]:
    with contextlib.suppress(FileNotFoundError):
        return [fleet.qemu(name)]
    return []


def said(guest: Guest, script: str) -> str:
    status, out = guest.shell.run(script, timeout_s=GUEST_S)
    assert status == 0
    return out.decode().strip()


def test_all_guests_go_on_under_the_next_daemon(fleet: Fleet) -> None:
    for name in NAMES:
        fleet.make(name)
    fleet.daemon.client.vmms_create(VmmsCreateData(id="empty"))
    guests = {name: fleet.guest(name) for name in NAMES}
    for name, guest in guests.items():
        guest.wait_ready()
        said(guest, f"echo {name} > /tmp/word")
    qemus = {name: fleet.qemu(name) for name in NAMES}
    fleet.put("other", "vm.pause")

    fleet.kill_daemon()
    fleet.daemon.restart()

    assert fleet.states() == {"one": "Running", "other": "Paused", "empty": None}
    assert {name: fleet.qemu(name) for name in NAMES} == qemus
    assert all(qemu.is_alive() for qemu in qemus.values())
    fleet.put("other", "vm.resume")
    assert [said(guests[name], "cat /tmp/word") for name in NAMES] == list(NAMES)

    fleet.daemon.client.vmms_delete(VmmsDeleteData(id="one"))
    assert not qemus["one"].is_alive()
    assert said(guests["other"], "echo here") == "here"
    assert descendants_of(fleet.daemon.pid) == set()  # they are nobody's children any more
    for guest in guests.values():
        guest.close()


def test_guest_that_cannot_be_taken_over_runs_until_its_vmm_is_deleted(fleet: Fleet) -> None:
    for name in NAMES:
        fleet.make(name)
    qemu = fleet.qemu("one")
    fleet.kill_daemon()
    (fleet.state / "vms" / "one" / "machine").write_text("{}")
    fleet.daemon.restart()

    found = fleet.vmms()
    assert (found["one"].state, found["other"].state) == (HeldState.FAILED, HeldState.RUNNING)
    assert "cannot be taken over" in " ".join(found["one"].error or [])
    assert qemu.is_alive()
    fleet.daemon.client.vmms_delete(VmmsDeleteData(id="one"))
    wait_until(lambda: not qemu.is_alive(), "its QEMU has ended", timeout_s=HOST_S)
    assert os.listdir(fleet.state / "vms") == ["other"]
    assert fleet.states() == {"other": "Running"}


@pytest.mark.parametrize("kills", [pytest.param(80, marks=pytest.mark.long)])
def test_kill_while_vmms_come_and_go_leaves_each_whole_or_nothing(fleet: Fleet, kills: int) -> None:
    chosen = random.Random(SEED)
    for _ in range(kills):
        fleet.strike(chosen.choice(NAMES), chosen.uniform(0, LAST_MOMENT_S))
        wait_until(fleet.is_whole, "a QEMU for each VM that runs, and none besides", timeout_s=HOST_S)
