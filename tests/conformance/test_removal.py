"""Asking for a device and waiting until the guest has let go: both clients, in process, and the remote."""

import asyncio
import contextlib
import threading

import pytest

import cloudvmm
from cloudvmm.client import AsyncClient, Client, NotFound, NotSupported, RemovalRefused
from cloudvmm.config.disk import DiskConfig
from cloudvmm.engine import base
from cloudvmm.engine.fake import FakeEngine
from support.argument import ARGUMENTS
from support.peer import Peer
from support.remote import Remote
from support.wait import wait_until

LONG_S = 20.0
SHORT_S = 0.2
STAYS = "The guest has not let go of the device disk0 after 0.2 s"


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def vmm(engine, tmp_path, socket_path):
    """A VMM with a VM that runs and has a disk."""
    (tmp_path / "disk").write_bytes(bytes(4096))
    with cloudvmm.Vmm(engine, api_socket=socket_path) as made:
        made.vm_create(ARGUMENTS["vm.create"])
        made.vm_add_disk(DiskConfig(path=str(tmp_path / "disk"), id="disk0"))
        made.vm_boot()
        yield made


@pytest.fixture(params=["in process", "blocking", "asyncio"])
def remove(request, vmm, socket_path):
    with contextlib.ExitStack() as ending:
        match request.param:
            case "in process":
                yield vmm.remove_device
            case "blocking":
                yield ending.enter_context(Client(socket_path)).remove_device
            case "asyncio":
                runner = ending.enter_context(asyncio.Runner())
                other = AsyncClient(socket_path)
                ending.callback(other.close)
                yield lambda *words: runner.run(other.remove_device(*words))


@pytest.fixture
def remote(tmp_path, socket_path):
    return Remote(tmp_path, "--api-socket", socket_path)


def refuse_when_asked(vmm, engine):
    """Have the guest say no once it is asked."""
    engine.last_machine.guest.refuse("device")

    def answer():
        wait_until(lambda: not vmm.vm_info().config.disks, "the request", timeout_s=LONG_S)
        engine.last_machine._report(base.RemovalRefused("disk0"))

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


@pytest.mark.parametrize("name", ["disk0", "_virtio-pci-disk0"])
def test_returns_when_the_guest_has_let_go(vmm, engine, remove, name):
    engine.last_machine.guest.refuse("device")
    obeying = threading.Timer(0.1, engine.last_machine.guest.obey, ["device"])
    obeying.start()
    remove(name, LONG_S)
    obeying.join()
    assert "disk0" not in vmm.vm_info().device_tree


def test_guest_that_does_nothing_is_told_at_the_deadline_and_may_let_go_later(vmm, engine, remove):
    engine.last_machine.guest.refuse("device")
    with pytest.raises(TimeoutError) as caught:
        remove("disk0", SHORT_S)
    assert str(caught.value) == STAYS
    info = vmm.vm_info()
    assert (info.config.disks, "disk0" in info.device_tree) == ([], True)

    engine.last_machine.guest.obey("device")
    wait_until(lambda: "disk0" not in vmm.vm_info().device_tree, "the removal", timeout_s=LONG_S)


def test_paused_guest_is_named(vmm, remove):
    vmm.vm_pause()
    with pytest.raises(TimeoutError) as caught:
        remove("disk0", SHORT_S)
    assert str(caught.value) == f"{STAYS}; the VM is paused"


def test_guest_that_refuses_is_told_at_once(vmm, engine, remove):
    answering = refuse_when_asked(vmm, engine)
    with pytest.raises(RemovalRefused, match="^The guest refuses to let go of the device disk0$"):
        remove("disk0", LONG_S)
    answering.join()


@pytest.mark.parametrize("end", ["vm_shutdown", "vm_reboot", "vm_delete"])
def test_end_of_the_vm_is_that_of_the_device(vmm, engine, remove, end):
    engine.last_machine.guest.refuse("device")
    removing = threading.Thread(target=lambda: ending(vmm, end))
    removing.start()
    remove("disk0", LONG_S)
    removing.join()


def ending(vmm, end):
    wait_until(lambda: not vmm.vm_info().config.disks, "the request", timeout_s=LONG_S)
    getattr(vmm, end)()


def test_device_of_a_vm_that_is_not_booted_goes_at_once(vmm, remove):
    vmm.vm_shutdown()
    remove("disk0", LONG_S)
    assert vmm.vm_info().config.disks == []


def test_unknown_device_is_not_waited_for(vmm, remove):
    with pytest.raises(NotFound):
        remove("disk1", LONG_S)


def test_server_without_events_is_not_asked(socket_path):
    asked = []

    def script(talk):
        asked.append(talk.read_request().split(b" ")[1].decode())
        talk.send(b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n")

    with Peer(socket_path, script), Client(socket_path) as client, pytest.raises(NotSupported):
        client.remove_device("disk0", SHORT_S)
    assert asked == ["/api/v1/vm.events"]


class TestRemote:
    def test_waits_and_succeeds(self, vmm, remote):
        assert remote("remove-device", "disk0", "--wait", "20") == (0, "", "")
        assert "disk0" not in vmm.vm_info().device_tree

    def test_says_that_the_guest_did_nothing(self, vmm, engine, remote):
        engine.last_machine.guest.refuse("device")
        outcome = remote("remove-device", "--wait", "0.2", "disk0")
        assert (outcome.status, outcome.out) == (1, "")
        assert outcome.err.endswith(f"exited with the following error:\n  {STAYS}\n")

    def test_says_that_the_guest_refuses(self, vmm, engine, remote):
        answering = refuse_when_asked(vmm, engine)
        outcome = remote("remove-device", "disk0", "--wait", "20")
        answering.join()
        assert outcome.status == 1
        assert outcome.err.endswith("  The guest refuses to let go of the device disk0\n")

    def test_refusal_of_the_server_is_shown_as_ever(self, vmm, remote):
        waiting, plain = remote("remove-device", "disk1", "--wait", "5"), remote("remove-device", "disk1")
        assert waiting.status == plain.status == 1
        assert waiting.chain() == plain.chain()

    def test_no_time_is_a_usage_error(self, vmm, remote):
        outcome = remote("remove-device", "disk0", "--wait", "soon")
        assert outcome.status == 2
        assert "invalid value 'soon' for '--wait <seconds>': not a time" in outcome.err
