"""`cloudvmm.Vmm` on the fake engine: the client's methods and exceptions, nothing left behind."""

import os
import threading

import pytest

import cloudvmm
from cloudvmm import api, client
from cloudvmm.client.table import VM_PAUSE
from cloudvmm.config.device import FsConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.form import INVALID_FD
from cloudvmm.config.net import InvalidMtu, NetConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.daemon.vmm import VmmEnded, VmmFailed
from cloudvmm.engine.fake import Die, FakeEngine, Hang
from cloudvmm.errors import VmmError, error_code
from support.argument import ARGUMENTS, arguments_of, method_name
from support.deadline import HOST_S
from support.leak import Holdings

CONFIG = ARGUMENTS["vm.create"]


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def vmm(engine):
    before = Holdings()
    with cloudvmm.Vmm(engine) as running:
        running.wait_until_ready(5)  # all its threads are there
        yield running
    before.assert_nothing_added()


@pytest.fixture
def booted(vmm):
    vmm.vm_create(CONFIG)
    vmm.vm_boot()
    return vmm


def test_life_of_a_vm(vmm):
    vmm.wait_until_ready(5)
    vmm.vm_create(CONFIG)
    assert vmm.vm_info().state is api.VmState.CREATED
    vmm.vm_boot()
    assert vmm.wait_until_running(5).state is api.VmState.RUNNING
    vmm.vm_pause()
    vmm.vm_resume()
    assert vmm.vm_counters() == {}
    vmm.vm_shutdown()
    vmm.vm_delete()
    with pytest.raises(client.NotFound):
        vmm.vm_info()


# vm.receive-migration waits for another VMM, which is not there.
@pytest.mark.parametrize(
    "request_type", [one for one in api.COMMANDS if one.name != "vm.receive-migration"], ids=repr
)
def test_each_method_answers_or_raises_what_the_client_does(vmm, request_type):
    method = getattr(vmm, method_name(request_type.name))
    try:
        method(*arguments_of(request_type.name))
    except client.ServerError as error:
        assert error.command == request_type.name
        assert isinstance(error.__cause__, request_type.error)
        assert error.code == error_code(error.__cause__)


def test_causes_are_the_vmms_own(vmm):
    with pytest.raises(client.NotFound) as caught:
        vmm.vm_info()

    assert (caught.value.status, caught.value.code) == (404, "VmNotCreated")
    assert caught.value.chain == ("Error from API", "The VM info is not available", "VM is not created")
    assert isinstance(caught.value.find(api.VmNotCreated), api.VmNotCreated)


def test_broken_rule_is_a_bad_request(vmm):
    vmm.vm_create(CONFIG)
    with pytest.raises(client.BadRequest) as caught:
        vmm.vm_add_net(NetConfig(mtu=5))

    assert caught.value.find(InvalidMtu) is not None


def test_value_that_the_wire_cannot_carry_is_a_bad_request(vmm):
    with pytest.raises(client.BadRequest) as caught:
        vmm.vm_add_net(NetConfig(mtu=-1))

    assert caught.value.chain[0] == "Failed to deserialize JSON"


@pytest.mark.parametrize("data", [None, FsConfig(tag="t", socket="/s")])
def test_data_of_another_command_is_refused(vmm, data):
    with pytest.raises(ValueError, match=r"vm\.add-disk takes a DiskConfig"):
        vmm.vm_add_disk(data)


def test_command_without_data_takes_none(vmm):
    with pytest.raises(ValueError, match=r"vm\.pause takes no data"):
        vmm.call(VM_PAUSE, CONFIG)


def test_config_stays_the_callers(vmm):
    vm_config = VmConfig(payload=CONFIG.payload, console=CONFIG.console, disks=[])
    vmm.vm_create(vm_config)
    vm_config.disks.append(DiskConfig(path="/mine"))
    vmm.vm_info().config.disks.append(DiskConfig(path="/mine too"))

    assert vmm.vm_info().config.disks == []


def test_descriptors_stay_the_callers(vmm, tmp_path):
    fd = os.open(tmp_path / "tap", os.O_CREAT | os.O_RDWR)
    vmm.vm_create(CONFIG)
    vmm.vm_add_net(NetConfig(id="n", fds=[fd]))

    assert vmm.vm_info().config.net[0].fds == [INVALID_FD]
    os.close(fd)  # ours; what the VMM holds is closed with the VM, as the fixture checks


def test_descriptors_of_a_refused_command_are_closed(vmm, tmp_path):
    fd = os.open(tmp_path / "tap", os.O_CREAT | os.O_RDWR)
    before = Holdings()
    with pytest.raises(client.NotFound):
        vmm.vm_add_net(NetConfig(fds=[fd]))

    before.assert_nothing_added()
    os.close(fd)


def test_bad_descriptor_is_an_error_and_nothing_is_kept(vmm, tmp_path):
    fd = os.open(tmp_path / "tap", os.O_CREAT | os.O_RDWR)
    before = Holdings()
    with pytest.raises(OSError, match="Bad file descriptor"):
        vmm.vm_add_net(NetConfig(fds=[fd, 10_000_000], num_queues=4))

    before.assert_nothing_added()
    os.close(fd)


def test_events_are_followed_from_the_start(booted):
    with booted.events(0) as stream:
        names = [stream.next(5).event for _ in range(3)]

    assert names == ["starting", "booting", "booted"]


def test_event_stream_ends_with_the_vmm(booted):
    stream = booted.events()
    booted.vmm_shutdown()

    assert [event.event for event in stream] == ["shutdown", "deleted", "shutdown"]
    assert stream.next(5) is None


def test_event_is_waited_for(booted):
    with booted.events() as stream:
        booted.vm_pause()
        assert stream.wait_for("vm", "paused", 5).source == "vm"
        with pytest.raises(TimeoutError):
            stream.wait_for("vm", "resumed", 0.02)
    assert booted.wait_for_event("vm", "booted", 5, from_number=0).number == 2


def test_closed_event_stream_lets_its_reader_go(vmm):
    stream = vmm.events()
    found = []
    reader = threading.Thread(target=lambda: found.append(stream.next(30)))
    reader.start()
    stream.close()
    reader.join(HOST_S)

    assert found == [None]


def test_rest_is_served_beside(engine, tmp_path):
    before = Holdings()
    path = tmp_path / "api"
    with cloudvmm.Vmm(engine, api_socket=path) as vmm, client.Client(path) as remote:
        vmm.vm_create(CONFIG)
        assert remote.vm_info() == vmm.vm_info()
        assert remote.wait_for_event("vmm", "starting", 5, from_number=0).number == 0
    assert not path.exists()
    before.assert_nothing_added()


def test_end_over_rest_is_the_end(engine, tmp_path):
    path = tmp_path / "api"
    with cloudvmm.Vmm(engine, api_socket=path) as vmm:
        stream = vmm.events()
        with client.Client(path) as remote:
            remote.vmm_shutdown()
        assert [event.source for event in stream] == ["vmm"]
        assert not path.exists()
        with pytest.raises(VmmEnded) as caught:
            vmm.vmm_ping()
    assert caught.value.may_have_run is False
    assert isinstance(caught.value, client.ConnectionFailed)


def test_socket_in_use_leaves_nothing(engine, tmp_path):
    with cloudvmm.Vmm(engine, api_socket=tmp_path / "api") as vmm:
        vmm.wait_until_ready(5)
        before = Holdings()
        with pytest.raises(VmmError, match="already in use"):
            cloudvmm.Vmm(FakeEngine(), api_socket=tmp_path / "api")
        before.assert_nothing_added()


def test_many_vmms_live_in_one_process():
    before = Holdings()
    vmms = [cloudvmm.Vmm("fake") for _ in range(3)]
    for vmm in vmms[:2]:
        vmm.vm_create(CONFIG)
    states = []
    for vmm in vmms:
        try:
            states.append(vmm.vm_info().state)
        except client.NotFound:
            states.append(None)
        vmm.close()

    assert states == [api.VmState.CREATED, api.VmState.CREATED, None]
    before.assert_nothing_added()


def test_state_dir_is_used(tmp_path):
    with cloudvmm.Vmm("fake", state_dir=tmp_path / "state") as vmm:
        vmm.vm_create(CONFIG)
    assert (tmp_path / "state" / "journal").exists()


def test_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="no engine called xen"):
        cloudvmm.Vmm("xen")


def test_deadline_says_that_the_command_goes_on(engine, vmm):
    vmm.vm_create(CONFIG)
    vmm.vm_boot()
    engine.faults.set("pause", Hang())
    with pytest.raises(client.NoAnswer) as caught:
        vmm.call(VM_PAUSE, timeout_s=0.05)

    assert caught.value.may_have_run


def test_machine_that_dies_leaves_the_vmm(engine, booted):
    engine.faults.set("pause", Die())
    with pytest.raises(client.InternalServerError):
        booted.vm_pause()
    with booted.events(0) as stream:
        stream.wait_for("vm", "shutdown", 5)

    assert booted.is_running


def test_fault_that_ends_the_vmm_is_raised_at_the_end(engine):
    with pytest.raises(VmmFailed) as caught, cloudvmm.Vmm(engine, no_shutdown=False) as vmm:
        vmm.vm_create(CONFIG)
        vmm.vm_boot()
        engine.last_machine.die()
        for _ in vmm.events():
            pass

    assert caught.value.__cause__ is not None


def test_second_close_does_nothing(vmm):
    vmm.close()
    vmm.close()
    assert not vmm.is_running


def test_calls_at_the_moment_of_the_end_all_get_an_answer():
    outcomes = []
    with cloudvmm.Vmm("fake") as vmm:

        def ping():
            try:
                while True:
                    vmm.vmm_ping()
            except client.ClientError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=ping) for _ in range(4)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(HOST_S)

    assert [isinstance(error, client.ConnectionFailed | client.ServerError) for error in outcomes] == [
        True
    ] * 4


def test_log_is_told():
    lines = []
    with (
        cloudvmm.Vmm("fake", log=lambda level, text: lines.append((level, text))) as vmm,
        pytest.raises(client.ServerError),
    ):
        vmm.vm_boot()

    assert ("info", "Event: source = vmm event = starting ") in lines
