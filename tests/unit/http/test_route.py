"""The routes against the table of commands, and what an answer does with descriptors; no socket here."""

import os
import select
import threading

import pytest

from cloudvmm.api import COMMANDS, Effect, Empty, EventFd, RequestSend, ResponseRecv, api_channel
from cloudvmm.api.action import VmBoot, VmmShutdown
from cloudvmm.http.exchange import Exchange
from cloudvmm.http.route import ROUTES, answer
from cloudvmm.http.service import VmmService
from cloudvmm.wire.http import Request
from cloudvmm.wire.response import response
from support.deadline import HOST_S

# rest.md section 6, as it is written there.
REFERENCE = {
    "GET": ["vmm.ping", "vm.info", "vm.counters"],
    "PUT": [
        *("vmm.shutdown", "vm.create", "vm.delete", "vm.boot", "vm.pause", "vm.resume", "vm.shutdown"),
        *("vm.reboot", "vm.power-button", "vm.nmi", "vm.resize", "vm.resize-disk", "vm.resize-zone"),
        *("vm.add-device", "vm.add-user-device", "vm.add-disk", "vm.add-fs", "vm.add-generic-vhost-user"),
        *("vm.add-net", "vm.add-pmem", "vm.add-vdpa", "vm.add-vsock", "vm.remove-device", "vm.snapshot"),
        *("vm.restore", "vm.coredump", "vm.receive-migration", "vm.send-migration"),
    ],
}


@pytest.fixture
def channel():
    sender, receiver = api_channel()
    event = EventFd()
    service = VmmService(event, sender)
    yield Exchange(service), receiver, event
    service.close()
    event.close()


def test_each_command_has_its_route_and_there_are_no_others():
    assert {path: route.command for path, route in ROUTES.items()} == {
        f"/api/v1/{command.name}": command for command in COMMANDS
    }


def test_each_route_has_the_reference_s_method():
    paths = {f"/api/v1/{name}": method for method, names in REFERENCE.items() for name in names}
    assert paths.items() <= {path: route.method for path, route in ROUTES.items()}.items()


def test_commands_that_read_are_got_and_others_are_put():
    assert {route.command for route in ROUTES.values() if route.method == "GET"} == {
        command for command in COMMANDS if command.effect is Effect.READS
    }


def test_commands_that_read_take_no_data():
    assert all(command.body is None for command in COMMANDS if command.effect is Effect.READS)


def test_only_shutdown_of_the_vmm_answers_200_for_nothing():
    assert {name for name, route in ROUTES.items() if route.done != response(204)} == {"/api/v1/vmm.shutdown"}


@pytest.mark.parametrize("path", ["", "/", "/api/v1", "/api/v1/vm.boot ", "/api/v1/VM.boot"])
def test_unknown_path_is_answered_without_the_vmm(channel, path):
    exchange, receiver, _ = channel
    assert answer(Request("PUT", path, None), [], exchange) == response(
        404, b'["Not Found"]', code="NotFound"
    )
    assert receiver.take() is None


def test_exchange_that_was_cut_sends_nothing(channel):
    exchange, receiver, event = channel
    exchange.cut()
    with pytest.raises(ResponseRecv):
        exchange.call(VmBoot, None, [])
    assert (receiver.take(), event.read()) == (None, 0)


def test_ended_vmm_leaves_the_descriptors_to_the_caller(channel):
    exchange, receiver, _ = channel
    receiver.close()
    fds = [1, 2]
    with pytest.raises(RequestSend):
        exchange.call(VmmShutdown, None, fds)
    assert fds == [1, 2]


def test_queued_request_takes_the_descriptors_along(channel):
    exchange, receiver, event = channel
    read, write = os.pipe()
    fds = [read, write]
    receiver_answer = answer_next(receiver, event)
    body = b'{"num_queues":4}'
    raw = answer(Request("PUT", "/api/v1/vm.add-net", body), fds, exchange)
    receiver_answer.join(HOST_S)
    assert fds == []
    assert raw == response(
        500, b'["Error from API","Wrong response payload type"]', code="ResponsePayloadType"
    )
    for fd in (read, write):
        os.close(fd)


def answer_next(receiver, event):
    """Answer the next request with `Empty`, which is what no add answers."""

    def run():
        select.select([event], [], [], 5)
        request = receiver.take()
        assert request is not None
        request.reply.send(Empty())

    thread = threading.Thread(target=run)
    thread.start()
    return thread
