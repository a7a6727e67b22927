"""The rungs that the other tests of the whole program stand on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.deadline import GUEST_S, HOST_S
from support.server import Server
from support.vm import EngineChoice, Guest
from support.vmm import Vmm
from support.wait import wait_until


def test_server_started_and_told_to_shut_down_leaves_nothing(
    fake_engine: EngineChoice, server: Server
) -> None:
    assert server.vmm.get("vmm.ping")["pid"] == server.pid
    server.vmm.put("vmm.shutdown")
    assert server.wait_end() == 0


def test_server_killed_leaves_its_socket_and_nothing_else(fake_engine: EngineChoice, server: Server) -> None:
    server.kill()
    assert server.wait_end() == -9


def test_unexpected_status_is_reported_with_the_error_chain(fake_engine: EngineChoice, vmm: Vmm) -> None:
    with pytest.raises(
        AssertionError, match="404 instead of success: Error from API <- .* <- VM config is missing"
    ):
        vmm.put("vm.boot")


def test_created_vm_has_its_config_and_does_not_run(
    fake_engine: EngineChoice, vm_created: Vmm, vm_config: dict[str, Any]
) -> None:
    info = vm_created.get("vm.info")
    assert info["state"] == "Created"
    assert info["config"]["payload"] == vm_config["payload"]


def test_booted_vm_runs_and_says_so(any_engine: EngineChoice, vm_booted: Vmm, guest: Guest) -> None:
    assert vm_booted.get("vm.info")["state"] == "Running"
    guest.wait_kernel_log(b"cloudvmm-guest ready")


@pytest.mark.qemu
def test_server_killed_takes_its_guest_with_it(server: Server, vm_created: Vmm) -> None:
    vm_created.put("vm.boot")
    qemu = [child for child in server.children() if "qemu-system" in child.command]
    assert len(qemu) == 1
    server.kill()
    wait_until(lambda: not qemu[0].is_alive(), "QEMU ends", timeout_s=HOST_S)


@pytest.mark.qemu
def test_script_runs_inside_the_booted_guest(vm_booted: Vmm, guest: Guest) -> None:
    status, output = guest.shell.run("cat /proc/cmdline; exit 3", timeout_s=GUEST_S)
    assert status == 3
    assert output.startswith(b"console=ttyS0")


def test_two_servers_do_not_disturb_each_other(
    fake_engine: EngineChoice, cloudvmm_server: Any, tmp_path: Path
) -> None:
    first, second = cloudvmm_server(), cloudvmm_server()
    assert first.vmm.get("vmm.ping")["pid"] != second.vmm.get("vmm.ping")["pid"]
