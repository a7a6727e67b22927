"""File descriptors that travel with requests: rest.md section 5."""

import os

import pytest

from cloudvmm import api
from cloudvmm.config import form
from cloudvmm.http import start_http_path_thread
from support.deadline import HOST_S
from support.leak import Holdings
from support.rest import RestClient, same_file
from support.wait import wait_until

BAD_REQUEST = b'["Bad Request"]'


@pytest.fixture
def files(tmp_path):
    """Five different open files; ours, so closing what the server received leaves them be."""
    fds = [os.open(tmp_path / str(number), os.O_CREAT | os.O_RDWR) for number in range(5)]
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.fixture
def steady(client):
    """What is held while one connection is open and nothing is under way."""
    client.ping()
    return Holdings()


def assert_received(received, sent):
    assert len(received) == len(sent)
    assert all(same_file(one, other) for one, other in zip(received, sent, strict=True))
    assert all(not os.get_inheritable(fd) for fd in received)
    assert not set(received) & set(sent)


def close_all(*fds):
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_add_net_takes_any_number(client, vmm, files, steady, count):
    assert client.ask("PUT", "vm.add-net", {"num_queues": 2 * count}, files[:count]).status == 200
    received = vmm.await_request("vm.add-net").data.fds
    assert_received(received, files[:count])
    close_all(*received)
    steady.assert_nothing_added()


def test_add_net_takes_253(client, vmm, files, steady):
    assert client.ask("PUT", "vm.add-net", {}, [files[0]] * 253).status == 200
    received = vmm.await_request("vm.add-net").data.fds
    assert_received(received, [files[0]] * 253)
    close_all(*received)
    steady.assert_nothing_added()


def test_add_net_without_any_has_none(client, vmm):
    assert client.ask("PUT", "vm.add-net", {"fds": [0, 1, 2]}).status == 200
    assert vmm.await_request("vm.add-net").data.fds is None


def test_numbers_in_the_body_do_not_stand_for_what_was_sent(client, vmm, files):
    assert client.ask("PUT", "vm.add-net", {"fds": [0, 1, 2]}, files[:1]).status == 200
    received = vmm.await_request("vm.add-net").data.fds
    assert_received(received, files[:1])
    close_all(*received)


def test_add_device_takes_one(client, vmm, files):
    assert client.ask("PUT", "vm.add-device", {"fd": 0}, files[:1]).status == 200
    received = [vmm.await_request("vm.add-device").data.fd]
    assert_received(received, files[:1])
    close_all(*received)


def test_add_device_without_any_has_none(client, vmm):
    assert client.ask("PUT", "vm.add-device", {"path": "/x", "fd": 0}).status == 200
    assert vmm.await_request("vm.add-device").data.fd is None


def test_restore_takes_net_then_vfio_then_iommufd(client, vmm, files, steady):
    body = {
        "source_url": "file:///s",
        "net_fds": [{"id": "a", "num_fds": 2}, {"id": "b"}, {"id": "c", "num_fds": 1, "fds": [0]}],
        "vfio_fds": [{"id": "v", "fd": 0}],
    }
    assert client.ask("PUT", "vm.restore", body, files).status == 204
    data = vmm.await_request("vm.restore").data
    assert [len(net.fds or []) for net in data.net_fds] == [2, 0, 1]
    received = [*data.net_fds[0].fds, *data.net_fds[2].fds, data.vfio_fds[0].fd, data.iommufd_fd]
    assert_received(received, files)
    close_all(*received)
    steady.assert_nothing_added()


def test_restore_with_an_empty_vfio_list_takes_the_iommufd(client, vmm, files):
    assert (
        client.ask("PUT", "vm.restore", {"source_url": "file:///s", "vfio_fds": []}, files[:1]).status == 204
    )
    received = [vmm.await_request("vm.restore").data.iommufd_fd]
    assert_received(received, files[:1])
    close_all(*received)


def test_receive_migration_takes_vfio_then_iommufd(client, vmm, files):
    body = {"receiver_url": "unix:/m", "vfio_fds": [{"id": "a"}, {"id": "b"}]}
    assert client.ask("PUT", "vm.receive-migration", body, files[:3]).status == 204
    data = vmm.await_request("vm.receive-migration").data
    received = [data.vfio_fds[0].fd, data.vfio_fds[1].fd, data.iommufd_fd]
    assert_received(received, files[:3])
    close_all(*received)


@pytest.mark.parametrize(
    ("name", "body", "count"),
    [
        ("vm.add-device", {"path": "/x"}, 2),
        ("vm.add-device", b"not json either", 2),
        ("vm.restore", {"source_url": "file:///s"}, 1),
        ("vm.restore", {"source_url": "file:///s", "net_fds": [{"id": "a", "num_fds": 2}]}, 1),
        ("vm.restore", {"source_url": "file:///s", "net_fds": [{"id": "a", "num_fds": 2}]}, 3),
        ("vm.restore", {"source_url": "file:///s", "vfio_fds": [{"id": "a"}]}, 1),
        ("vm.restore", {"source_url": "file:///s", "vfio_fds": []}, 0),
        ("vm.restore", {"source_url": "file:///s", "net_fds": [{"id": "a", "num_fds": 4294967295}]}, 0),
        ("vm.receive-migration", {"receiver_url": "unix:/m"}, 1),
        ("vm.receive-migration", {"receiver_url": "unix:/m", "vfio_fds": [{"id": "a"}]}, 1),
        ("vm.receive-migration", {"receiver_url": "unix:/m", "vfio_fds": [{"id": "a"}]}, 0),
    ],
)
def test_wrong_number_is_refused_and_nothing_kept(client, vmm, files, steady, name, body, count):
    reply = client.ask("PUT", name, body, files[:count])
    assert (reply.status, reply.body) == (400, BAD_REQUEST)
    assert vmm.names() == ["vmm.ping"]
    steady.assert_nothing_added()


@pytest.mark.parametrize(
    ("method", "name", "body"),
    [
        ("GET", "vmm.ping", None),
        ("GET", "vm.info", None),
        ("PUT", "vm.create", {}),
        ("PUT", "vm.boot", None),
        ("PUT", "vm.boot", {}),
        ("PUT", "vm.add-disk", {"path": "/d"}),
        ("PUT", "vm.add-net", b"{"),
        ("PATCH", "vm.add-net", {}),
        ("GET", "nowhere", None),
    ],
)
def test_where_none_is_used_all_are_closed(client, files, steady, method, name, body):
    client.ask(method, name, body, files)
    steady.assert_nothing_added()


def test_create_forgets_numbers_in_the_body(client, vmm):
    body = {
        "net": [{"fds": [0, 1], "num_queues": 4}],
        "devices": [{"fd": 2}],
        "platform": {"iommufd_fd": 3},
    }
    assert client.ask("PUT", "vm.create", body).status == 204
    config = vmm.await_request("vm.create").data
    assert (config.net[0].fds, config.devices[0].fd) == (None, None)
    assert config.platform.iommufd_fd == form.INVALID_FD


def test_descriptors_sent_with_the_first_bytes_belong_to_the_whole_request(client, vmm, files):
    body = b'{"num_queues":2}'
    client.send(b"PUT /api/v1/vm.add-net HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n", files[:1])
    client.send(b"Content-Length: %d\r\n\r\n" % len(body))
    client.send(body)
    assert client.reply().status == 200
    received = vmm.await_request("vm.add-net").data.fds
    assert_received(received, files[:1])
    close_all(*received)


def test_descriptors_of_several_messages_are_kept_in_order(client, vmm, files):
    raw = b"PUT /api/v1/vm.add-net HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"
    for place, fd in enumerate(files):
        client.send(raw[place : place + 1], [fd])
    client.send(raw[len(files) :])
    assert client.reply().status == 200
    received = vmm.await_request("vm.add-net").data.fds
    assert_received(received, files)
    close_all(*received)


def test_no_request_holds_more_than_253(client, server, vmm, files):
    client.ping()
    before = Holdings()
    client.send(b"PUT /api/v1/vm.add-net HTTP/1.1\r\n", [files[0]] * 253)
    client.send(b"X: y\r\n", files[:1])
    reply = client.reply()

    assert reply.status == 500
    assert reply.texts() == ["No room for the file descriptors that came with the request"]
    client.close()
    wait_until(lambda: server.connection_count == 0, "the connection's end", timeout_s=HOST_S)
    before.assert_nothing_added()
    assert vmm.names() == ["vmm.ping"]


def test_descriptors_do_not_reach_the_next_request(client, vmm, files):
    client.ask("GET", "vmm.ping", None, files)
    assert client.ask("PUT", "vm.add-net", {}).status == 200
    assert vmm.await_request("vm.add-net").data.fds is None


def test_descriptors_of_a_refused_request_are_closed(client, vmm, files, steady):
    client.send(b"garbage\r\n", files)
    assert client.reply().status == 400
    assert client.ask("PUT", "vm.add-net", {}).status == 200
    assert vmm.await_request("vm.add-net").data.fds is None
    steady.assert_nothing_added()


def test_descriptors_of_half_a_request_are_closed_when_the_client_goes(client, server, files):
    client.ping()
    before = Holdings()
    client.send(b"PUT /api/v1/vm.add-net HTTP/1.1\r\n", files)
    client.close()
    wait_until(lambda: server.connection_count == 0, "the connection's end", timeout_s=HOST_S)
    before.assert_nothing_added()


def test_descriptors_handed_over_stay_open_when_the_command_fails(client, vmm, files):
    vmm.answer("vm.add-net", api.VmAddNetError())
    assert client.ask("PUT", "vm.add-net", {}, files[:1]).status == 500
    received = vmm.await_request("vm.add-net").data.fds
    assert_received(received, files[:1])
    close_all(*received)


def test_descriptors_that_could_not_be_handed_over_are_closed(client, vmm, files, steady):
    vmm.leave()
    assert client.ask("PUT", "vm.add-net", {}, files).status == 500
    steady.assert_nothing_added()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("vm.add-net", b'{"fds":[2147483648]}'),
        ("vm.add-net", b'{"fds":[-2147483649]}'),
        ("vm.add-device", b'{"fd":2147483648}'),
        ("vm.create", b'{"net":[{"fds":[3,4294967296]}]}'),
        ("vm.create", b'{"devices":[{"fd":1e3}]}'),
    ],
)
def test_number_that_no_descriptor_can_have_is_refused_although_it_would_be_dropped(client, vmm, name, body):
    reply = client.ask("PUT", name, body)
    assert (reply.status, reply.texts()[0]) == (400, "Failed to deserialize JSON")
    assert vmm.names() == []


def test_numbers_in_json_are_dropped_with_a_warning_in_the_log(vmm, socket_path):
    logged = []
    server = start_http_path_thread(
        socket_path, vmm.event, vmm.sender, log=lambda level, text: logged.append((level, text))
    )
    with RestClient(socket_path) as client:
        assert client.ask("PUT", "vm.add-net", {"id": "n0", "fds": [3]}).status == 200
    assert server.close(deadline_s=HOST_S)
    assert [(level, "FD numbers were present" in text) for level, text in logged] == [("warn", True)]
