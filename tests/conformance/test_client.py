"""The typed clients against a live server: each method, its data, its answer, its errors, its descriptors."""

import asyncio
import os
import threading

import pytest

from cloudvmm import api, client
from cloudvmm.config.device import DeviceConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import RestoreConfig, RestoredNetConfig, RestoredVfioConfig
from cloudvmm.config.vm import VmConfig
from support.argument import arguments_of, method_name
from support.deadline import HOST_S
from support.leak import Holdings
from support.rest import FORKED, JOBS, PONG, SAVING, UNDER_WAY, same_file
from support.wait import wait_until

DEVICE = api.PciDeviceInfo(id="_disk0", bdf="0000:00:01.0")


@pytest.fixture(params=["blocking", "asyncio"])
def call(request, server, socket_path):
    """`call(name, *arguments)` carries a command out by its method, on both clients."""
    if request.param == "blocking":
        with client.Client(socket_path, timeout_s=10) as made:
            yield lambda name, *arguments: getattr(made, method_name(name))(*arguments)
    else:

        async def once(name, arguments):
            async with client.AsyncClient(socket_path, timeout_s=10) as made:
                return await getattr(made, method_name(name))(*arguments)

        yield lambda name, *arguments: asyncio.run(once(name, arguments))


def expected(request_type):
    if request_type is api.VmAction.COUNTERS.value:
        return {"d": {"read_bytes": 1}}
    answers = {
        api.VmActionPayload: DEVICE,
        api.VmForkResponse: FORKED,
        api.VmmPingResponse: PONG,
        api.VmMigrationProgress: UNDER_WAY,
        api.VmSnapshotProgress: SAVING,
        api.VmmJobs: JOBS,
    }
    return answers.get(request_type.answer)


@pytest.mark.parametrize(
    "request_type", [one for one in api.COMMANDS if one.answer is not api.VmInfo], ids=repr
)
def test_each_method_sends_its_data_and_returns_its_answer(call, vmm, request_type):
    vmm.answer("vm.counters", api.VmActionPayload(b'{"d":{"read_bytes":1}}'))
    arguments = arguments_of(request_type.name)

    assert call(request_type.name, *arguments) == expected(request_type)
    assert [vmm.await_request(request_type.name).data] == (arguments or [None])


def test_info_is_what_the_vmm_says(call, vmm):
    node = api.DeviceNode(
        id="_virtio-pci-d",
        resources=[
            {"PciBar": api.PciBarResource(index=0, base=1, size=2, type_="Mmio64", prefetchable=False)},
            {"MmioAddressRange": api.AddressRange(base=3, size=4)},
            {"LegacyIrq": 5},
        ],
        children=["d"],
        pci_bdf="0000:00:01.0",
    )
    info = api.VmInfo(
        config=VmConfig(net=[NetConfig(id="n", mac="12:34:56:78:9a:bc")]),
        state=api.VmState.PAUSED,
        memory_actual_size=2**63,
        device_tree={node.id: node},
    )
    vmm.answer("vm.info", info)

    assert call("vm.info") == info


def test_cold_add_returns_none(call, vmm):
    vmm.answer("vm.add-disk", api.VmActionPayload())

    assert call("vm.add-disk", *arguments_of("vm.add-disk")) is None


@pytest.mark.parametrize("request_type", api.COMMANDS, ids=repr)
def test_failed_command_raises_with_the_causes_of_the_server(call, vmm, request_type):
    error = request_type.error()
    error.__cause__ = api.VmNotCreated()
    vmm.answer(request_type.name, error)

    with pytest.raises(client.NotFound) as caught:
        call(request_type.name, *arguments_of(request_type.name))

    assert type(caught.value.__cause__) is request_type.error
    assert caught.value.find(api.VmNotCreated) is not None
    assert caught.value.code == "VmNotCreated"
    assert (caught.value.command, caught.value.status) == (request_type.name, 404)


def test_data_of_another_command_is_a_bad_request(call, vmm):
    with pytest.raises(client.BadRequest) as caught:
        call("vm.resize-disk", NetConfig())

    assert caught.value.chain[0] == "Failed to deserialize JSON"
    assert vmm.names() == []


@pytest.fixture
def files(tmp_path):
    fds = [os.open(tmp_path / str(number), os.O_CREAT | os.O_RDWR) for number in range(4)]
    yield fds
    for fd in fds:
        os.close(fd)  # still ours


def assert_same_files(received, sent):
    assert [same_file(one, other) for one, other in zip(received, sent, strict=True)] == [True] * len(sent)
    for fd in received:
        os.close(fd)


def test_net_descriptors_arrive(call, vmm, files):
    call("vm.add-net", NetConfig(fds=files, num_queues=8))

    assert_same_files(vmm.await_request("vm.add-net").data.fds, files)


def test_vfio_descriptor_arrives(call, vmm, files):
    call("vm.add-device", DeviceConfig(fd=files[0]))

    assert_same_files([vmm.await_request("vm.add-device").data.fd], files[:1])


def test_descriptors_of_a_restore_arrive_where_they_belong(call, vmm, files):
    data = RestoreConfig(
        source_url="file:///s",
        net_fds=[RestoredNetConfig(id="a", fds=files[:2]), RestoredNetConfig(id="b")],
        vfio_fds=[RestoredVfioConfig(id="v", fd=files[2])],
        iommufd_fd=files[3],
    )
    call("vm.restore", data)

    received = vmm.await_request("vm.restore").data
    assert [net.id for net in received.net_fds] == ["a", "b"]
    assert_same_files([*received.net_fds[0].fds, received.vfio_fds[0].fd, received.iommufd_fd], files)


def test_client_leaves_nothing_behind(server, socket_path, vmm):
    before = Holdings()
    with client.Client(socket_path) as made:
        made.vmm_ping()
        vmm.answer("vm.boot", api.VmBootError())
        with pytest.raises(client.InternalServerError):
            made.vm_boot()

    before.assert_nothing_added()


def test_threads_share_a_client(server, socket_path, vmm):
    requests = []
    vmm.answer("vm.snapshot", requests.append)
    with client.Client(socket_path, timeout_s=10) as made:
        thread = threading.Thread(target=made.vm_snapshot, args=arguments_of("vm.snapshot"))
        thread.start()
        wait_until(lambda: requests, "the snapshot is under way", timeout_s=HOST_S)
        assert made.vmm_ping() == PONG
        requests[0].reply.send(api.Empty())
        thread.join(HOST_S)
        assert not thread.is_alive()


def test_tasks_share_a_client(server, socket_path, vmm):
    requests = []
    vmm.answer("vm.snapshot", requests.append)

    async def work():
        async with client.AsyncClient(socket_path, timeout_s=10) as made:
            task = asyncio.create_task(made.vm_snapshot(*arguments_of("vm.snapshot")))
            while not requests:
                await made.vmm_ping()
            assert not task.done()
            requests[0].reply.send(api.Empty())
            await task

    asyncio.run(work())


def test_cancelled_task_gives_its_connection_up(server, socket_path, vmm):
    requests = []
    vmm.answer("vm.snapshot", requests.append)
    before = Holdings()

    async def work():
        async with client.AsyncClient(socket_path, timeout_s=10) as made:
            task = asyncio.create_task(made.vm_snapshot(*arguments_of("vm.snapshot")))
            while not requests:
                await made.vmm_ping()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await made.vmm_ping() == PONG

    asyncio.run(work())
    requests[0].reply.send(api.Empty())
    before.assert_nothing_added()


def test_deadline_of_a_command_says_that_it_may_have_run(server, socket_path, vmm):
    requests = []
    vmm.answer("vm.pause", requests.append)
    with client.Client(socket_path, timeout_s=0.05) as made, pytest.raises(client.NoAnswer) as caught:
        made.vm_pause()

    assert caught.value.may_have_run
    assert isinstance(caught.value.__cause__, TimeoutError)
    vmm.await_request("vm.pause").reply.send(api.Empty())


def test_deadline_of_a_task_says_that_it_may_have_run(server, socket_path, vmm):
    requests = []
    vmm.answer("vm.pause", requests.append)

    async def work():
        async with client.AsyncClient(socket_path, timeout_s=0.05) as made:
            await made.vm_pause()

    with pytest.raises(client.NoAnswer):
        asyncio.run(work())
    vmm.await_request("vm.pause").reply.send(api.Empty())


def test_long_command_has_a_limit_of_its_own(server, socket_path, vmm):
    requests = []
    vmm.answer("vm.snapshot", requests.append)
    with (
        client.Client(socket_path, timeout_s=30, long_timeout_s=0.05) as made,
        pytest.raises(client.NoAnswer),
    ):
        made.vm_snapshot(*arguments_of("vm.snapshot"))
    vmm.await_request("vm.snapshot").reply.send(api.Empty())


def test_eleventh_connection_is_told_that_the_server_is_full(server, socket_path, vmm):
    with client.Client(socket_path, timeout_s=60) as made:
        others = [client.Client(socket_path) for _ in range(10)]
        for other in others:
            other.vmm_ping()
        with pytest.raises(client.ServerFull):
            made.vmm_ping()
        for other in others:
            other.close()
        made.wait_until_ready(60)


def test_body_of_a_megabyte_arrives_whole_from_a_task(server, socket_path, vmm):
    long = "x" * (1 << 20)

    async def work():
        async with client.AsyncClient(socket_path, timeout_s=10) as made:
            data = arguments_of("vm.snapshot")[0]
            await made.vm_snapshot(type(data)(destination_url=long))

    asyncio.run(work())

    assert vmm.await_request("vm.snapshot").data.destination_url == long
