"""A daemon with two real guests at once: what happens to one is not seen by the other."""

from __future__ import annotations

import os
import signal

import pytest

from cloudvmm.api.fleet import VmmsCreateData, VmmsDeleteData
from support.daemon import Daemon
from support.deadline import GUEST_S, HOST_S
from support.process import ProcessId, descendants_of
from support.vm import Guest, choose_engine, small_config
from support.vmm import Vmm
from support.wait import wait_until

pytestmark = pytest.mark.qemu


def qemus(daemon: Daemon) -> set[ProcessId]:
    return {child for child in descendants_of(daemon.pid) if "qemu-system" in child.command}


def test_two_guests_in_one_process(tmp_path):
    engine = choose_engine("qemu")
    daemon = Daemon(tmp_path / "d", engine.flags)
    daemon.wait_ready()
    vmms, guests = [], []
    try:
        for name in ("one", "other"):
            folder = tmp_path / name
            folder.mkdir()
            held = daemon.client.vmms_create(VmmsCreateData(id=name))
            vmm = Vmm(held.api_socket)
            vmms.append(vmm)
            vmm.put("vm.create", small_config(engine, folder))
            before = qemus(daemon)
            vmm.put("vm.boot")
            guests.append(Guest(vmm, engine))
            assert len(qemus(daemon) - before) == 1
            first = before or qemus(daemon)
        for guest in guests:
            guest.wait_ready()
        assert [said(guest, "echo $((6 * 7))") for guest in guests] == [b"42", b"42"]
        assert states(daemon) == {"one": "Running", "other": "Running"}

        (qemu_of_one,) = first
        os.kill(qemu_of_one.pid, signal.SIGKILL)
        wait_until(lambda: states(daemon)["one"] == "Created", "one's end is noticed", timeout_s=HOST_S)

        assert said(guests[1], "echo still here") == b"still here"
        vmms[0].put("vm.boot")
        assert states(daemon) == {"one": "Running", "other": "Running"}
        daemon.client.vmms_delete(VmmsDeleteData(id="one"))
        assert said(guests[1], "echo and here") == b"and here"
        assert len(qemus(daemon)) == 1
    finally:
        for guest in guests:
            guest.close()
        for vmm in vmms:
            vmm.close()
        daemon.check_end()


def said(guest: Guest, script: str) -> bytes:
    status, out = guest.shell.run(script, timeout_s=GUEST_S)
    assert status == 0
    return out.strip()


def states(daemon: Daemon) -> dict[str, str | None]:
    return {
        vmm.id: None if vmm.vm_state is None else vmm.vm_state.value for vmm in daemon.client.vmms_list().vmms
    }
