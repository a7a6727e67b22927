"""A real guest through the client's methods: over the socket, and in this process. Seen from inside."""

from __future__ import annotations

import os

import msgspec
import pytest

import cloudvmm
from cloudvmm import api
from cloudvmm.client import Client, InternalServerError
from cloudvmm.config import form
from cloudvmm.config.vm import VmConfig
from cloudvmm.guest.shell import GuestShell
from support.accelerator import accelerator
from support.deadline import BOOT_S, GUEST_S
from support.leak import Holdings
from support.vm import choose_engine, small_config

pytestmark = pytest.mark.qemu


@pytest.fixture
def typed_config(tmp_path):
    """One vCPU, a shell on the console's PTY, a kernel log."""
    config = small_config(choose_engine("qemu"), tmp_path)
    return form.decode(msgspec.json.encode(config), VmConfig)


@pytest.fixture(params=["socket", "process"])
def vm(request, tmp_path):
    """The commands, over each way, to a VMM that stays when its guest switches itself off."""
    before = Holdings()
    if request.param == "socket":
        server = request.getfixturevalue("cloudvmm_server")("--no-shutdown")
        with Client(server.socket_path) as client:
            yield client
        return
    from cloudvmm.engine.qemu import QemuEngine

    with cloudvmm.Vmm(QemuEngine(accel=accelerator())) as vmm:
        yield vmm
    before.assert_nothing_added()


@pytest.fixture
def shell(vm, typed_config):
    """The guest's shell, once it is there."""
    vm.vm_create(typed_config)
    vm.vm_boot()
    console = os.open(
        vm.vm_info().config.console.file, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK
    )
    shell = GuestShell(console)
    shell.wait_ready(BOOT_S)
    yield shell
    os.close(console)


def test_guest_lives_and_dies(vm, shell):
    info = vm.wait_until_running(BOOT_S)
    assert shell.run("nproc", timeout_s=GUEST_S) == (0, b"1\n")
    assert info.config.cpus.boot_vcpus == 1
    assert info.device_tree["__rng"].parent == "_virtio-pci-__rng"

    with vm.events(0) as events:
        activated = [events.wait_for("virtio-device", "activated", GUEST_S) for _ in range(2)]
        assert {event.properties["id"] for event in activated} == {"__console", "__rng"}
        vm.vm_pause()
        assert vm.vm_info().state is api.VmState.PAUSED
        with pytest.raises(InternalServerError) as caught:
            vm.vm_pause()
        assert caught.value.code == "InvalidTransition"
        vm.vm_resume()
        assert shell.run("echo $((6 * 7))", timeout_s=GUEST_S) == (0, b"42\n")
        vm.vm_power_button()
        events.wait_for("vm", "shutdown", GUEST_S)
    assert vm.vm_info().state is api.VmState.CREATED
    vm.vm_delete()
