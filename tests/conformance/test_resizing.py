"""Asking for sizes and waiting until the guest has followed: both clients, in process, and the remote."""

import asyncio
import contextlib
import threading

import msgspec
import pytest

import cloudvmm
from cloudvmm.client import AsyncClient, Client, NotSupported, ResizeRefused, TooManyRequests
from cloudvmm.config.device import BalloonConfig
from cloudvmm.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig
from cloudvmm.config.operation import VmResizeData, VmResizeZoneData
from cloudvmm.engine import base
from cloudvmm.engine.fake import FakeEngine
from support.argument import ARGUMENTS
from support.deadline import HOST_S
from support.peer import Peer
from support.remote import Remote
from support.wait import wait_until

MIB = 1 << 20
LONG_S = 20.0
SHORT_S = 0.2
STEP_S = 5.0  # in which a step is taken though the host stands still for a while
LAGS = "The guest has not followed the resize after 0.2 s: it has"


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def memory():
    return MemoryConfig(size=512 * MIB, hotplug_method=HotplugMethod.VIRTIO_MEM, hotplug_size=1024 * MIB)


@pytest.fixture
def vmm(engine, memory, socket_path):
    """A VMM with a VM that runs: two vCPUs of four, virtio-mem, a balloon."""
    config = msgspec.structs.replace(
        ARGUMENTS["vm.create"], memory=memory, balloon=BalloonConfig(size=0), numa=None
    )
    config.cpus = msgspec.structs.replace(config.cpus, boot_vcpus=2, max_vcpus=4, topology=None)
    with cloudvmm.Vmm(engine, api_socket=socket_path) as made:
        made.vm_create(config)
        made.vm_boot()
        yield made


@pytest.fixture(params=["in process", "blocking", "asyncio"])
def client(request, vmm, socket_path):
    """Methods `resize` and `resize_zone` that block."""
    with contextlib.ExitStack() as ending:
        match request.param:
            case "in process":
                yield vmm
            case "blocking":
                yield ending.enter_context(Client(socket_path))
            case "asyncio":
                runner = ending.enter_context(asyncio.Runner())
                other = AsyncClient(socket_path)
                ending.callback(other.close)
                yield Awaited(runner, other)


class Awaited:
    def __init__(self, runner, client):
        self._runner, self._client = runner, client

    def resize(self, *words):
        self._runner.run(self._client.resize(*words))

    def resize_zone(self, *words):
        self._runner.run(self._client.resize_zone(*words))


@pytest.fixture
def guest(engine, vmm):
    return engine.last_machine.guest


@pytest.fixture
def remote(tmp_path, socket_path):
    return Remote(tmp_path, "--api-socket", socket_path)


def later(vmm, call, *words):
    """Do `call` in a thread, once the guest was asked for something."""

    def wait_and_call():
        with vmm.events(0) as events:
            events.wait_for("vm", "resized", LONG_S)
        call(*words)

    thread = threading.Thread(target=wait_and_call)
    thread.start()
    return thread


def test_returns_when_the_guest_has_followed_in_all(vmm, guest, client):
    guest.refuse("vcpus", "zone", "balloon")
    obeying = later(vmm, guest.obey, "vcpus", "zone", "balloon")
    sizes = VmResizeData(desired_vcpus=1, desired_ram=768 * MIB, desired_balloon=64 * MIB)
    client.resize(sizes, LONG_S)
    assert vmm.vm_info().memory_actual_size == 704 * MIB
    obeying.join()


def test_what_the_guest_has_already_is_not_waited_for(client):
    client.resize(VmResizeData(desired_vcpus=2, desired_balloon=0), LONG_S)
    client.resize(VmResizeData(), LONG_S)


def test_guest_that_does_nothing_is_told_at_the_deadline_and_may_follow_later(vmm, guest, client):
    guest.refuse("vcpus", "balloon")
    with pytest.raises(TimeoutError) as caught:
        client.resize(VmResizeData(desired_vcpus=1, desired_balloon=64 * MIB), SHORT_S)
    balloon = "it has 0 bytes in its balloon, and was asked for 67108864"
    assert str(caught.value) == f"{LAGS} 2 vCPUs, and was asked for 1, {balloon}; it has done nothing"
    assert vmm.vm_info().config.cpus.boot_vcpus == 1
    with pytest.raises(TooManyRequests):
        client.resize(VmResizeData(desired_vcpus=3), LONG_S)

    guest.obey("vcpus", "balloon")
    wait_until(lambda: vmm.vm_info().memory_actual_size == 448 * MIB, "the guest to follow", timeout_s=LONG_S)
    client.resize(VmResizeData(desired_vcpus=3), LONG_S)


def test_guest_that_stops_on_its_way_is_told_with_when(vmm, engine, guest, client):
    guest.refuse("zone")
    stepping = later(vmm, engine.last_machine._report, base.ZoneChanged("mem0", 64 * MIB))
    with pytest.raises(TimeoutError) as caught:
        client.resize(VmResizeData(desired_ram=1024 * MIB), STEP_S)
    stepping.join()
    words, _, ago = str(caught.value).rpartition("its last step was ")
    assert words.endswith("it has 603979776 bytes of RAM, and was asked for 1073741824; ")
    assert ago.endswith(" s ago") and 0 < float(ago.removesuffix(" s ago")) <= HOST_S


def test_paused_guest_is_named(vmm, client):
    vmm.vm_pause()
    with pytest.raises(TimeoutError, match=r"2 vCPUs, and was asked for 1; the VM is paused$"):
        client.resize(VmResizeData(desired_vcpus=1), SHORT_S)


def test_guest_that_refuses_is_told_at_once(vmm, engine, guest, client):
    guest.refuse("vcpus")
    refusing = later(vmm, engine.last_machine._report, base.ResizeRefused("vcpus"))
    with pytest.raises(ResizeRefused, match="refuses a resize: it has 2 vCPUs, and was asked for 1$"):
        client.resize(VmResizeData(desired_vcpus=1), LONG_S)
    refusing.join()


@pytest.mark.parametrize("end", ["vm_shutdown", "vm_reboot", "vm_delete"])
def test_end_of_the_vm_ends_the_waiting(vmm, guest, client, end):
    guest.refuse("vcpus")
    ending = later(vmm, getattr(vmm, end))
    client.resize(VmResizeData(desired_vcpus=1), LONG_S)
    ending.join()


def test_sizes_of_a_vm_that_is_not_booted_are_set_at_once(vmm, client):
    vmm.vm_shutdown()
    client.resize(VmResizeData(desired_vcpus=1, desired_ram=256 * MIB), LONG_S)
    assert vmm.vm_info().config.memory.size == 256 * MIB


class TestModules:
    @pytest.fixture
    def memory(self):
        return MemoryConfig(size=512 * MIB, hotplug_size=1024 * MIB)

    def test_modules_are_taken_and_less_is_for_the_next_boot(self, vmm, client):
        client.resize(VmResizeData(desired_ram=768 * MIB), LONG_S)
        client.resize(VmResizeData(desired_ram=256 * MIB), LONG_S)
        assert vmm.vm_info().config.memory.size == 256 * MIB


class TestZones:
    @pytest.fixture
    def memory(self):
        zones = [MemoryZoneConfig(id="near", size=512 * MIB, hotplug_size=512 * MIB)]
        return MemoryConfig(size=0, hotplug_method=HotplugMethod.VIRTIO_MEM, zones=zones)

    def test_zone_is_waited_for(self, vmm, guest, client):
        client.resize_zone(VmResizeZoneData(id="near", desired_ram=640 * MIB), LONG_S)
        assert vmm.vm_info().memory_actual_size == 640 * MIB
        guest.refuse("zone")
        with pytest.raises(TimeoutError, match="671088640 bytes in the zone near, and was asked for 5368"):
            client.resize_zone(VmResizeZoneData(id="near", desired_ram=512 * MIB), SHORT_S)

    def test_remote_waits_for_a_zone(self, vmm, remote):
        assert remote("resize-zone", "--id", "near", "--size", "640M", "--wait", "20") == (0, "", "")
        assert vmm.vm_info().memory_actual_size == 640 * MIB


def test_server_without_events_is_not_asked(socket_path):
    asked = []

    def script(talk):
        asked.append(talk.read_request().split(b" ")[1].decode())
        talk.send(b"HTTP/1.1 404 \r\nContent-Length: 0\r\n\r\n")

    with Peer(socket_path, script), Client(socket_path) as client, pytest.raises(NotSupported):
        client.resize(VmResizeData(desired_vcpus=1), SHORT_S)
    assert asked == ["/api/v1/vm.events"]


class TestRemote:
    def test_waits_and_succeeds(self, vmm, remote):
        assert remote("resize", "--cpus", "1", "--memory", "768M", "--wait", "20") == (0, "", "")
        assert vmm.vm_info().memory_actual_size == 768 * MIB

    def test_says_how_far_the_guest_is(self, guest, remote):
        guest.refuse("vcpus")
        outcome = remote("resize", "--wait", "0.2", "--cpus", "1")
        assert (outcome.status, outcome.out) == (1, "")
        assert outcome.err.endswith(f"{LAGS} 2 vCPUs, and was asked for 1; it has done nothing\n")

    def test_refusal_of_the_server_is_shown_as_ever(self, vmm, remote):
        waiting, plain = remote("resize", "--cpus", "9", "--wait", "5"), remote("resize", "--cpus", "9")
        assert waiting.status == plain.status == 1
        assert waiting.chain() == plain.chain()
