"""Every endpoint with every method, with a body and without: rest.md section 3."""

import msgspec
import pytest

from cloudvmm.api import (
    COMMANDS,
    Effect,
    Empty,
    VmActionPayload,
    VmForkResponse,
    VmInfo,
    VmMigrationProgress,
    VmmJobs,
    VmmPingResponse,
    VmSnapshotProgress,
)
from support.rest import plain_answer

BAD_REQUEST = b'["Bad Request"]'
WORDY = {"vm.create", "vm.info", "vmm.ping", "vmm.shutdown"}
BODIES = {
    "vm.create": {},
    "vm.resize": {"desired_vcpus": 2},
    "vm.resize-disk": {"id": "d", "desired_size": 1},
    "vm.resize-zone": {"id": "z", "desired_ram": 1},
    "vm.add-device": {"path": "/sys/x"},
    "vm.add-user-device": {"socket": "/s"},
    "vm.add-disk": {"path": "/d"},
    "vm.add-fs": {"tag": "t", "socket": "/s"},
    "vm.add-generic-vhost-user": {"socket": "/s", "queue_sizes": [1], "device_type": 2},
    "vm.add-net": {"tap": "t"},
    "vm.add-pmem": {"file": "/p"},
    "vm.add-vdpa": {"path": "/v", "num_queues": 1},
    "vm.add-vsock": {"cid": 3, "socket": "/s"},
    "vm.remove-device": {"id": "d"},
    "vm.snapshot": {"destination_url": "file:///s"},
    "vm.fork": {"directory": "/s"},
    "vm.restore": {"source_url": "file:///s"},
    "vmm.cancel-job": {"id": 7},
    "vm.coredump": {"destination_url": "file:///c"},
    "vm.receive-migration": {"receiver_url": "unix:/m"},
    "vm.send-migration": {"destination_url": "unix:/m"},
}

READING = [command.name for command in COMMANDS if command.effect is Effect.READS]
CHANGING = [command.name for command in COMMANDS if command.effect is Effect.CHANGES]
NAMES = READING + CHANGING
PLAIN = sorted(set(NAMES) - WORDY)
BODILESS = [
    "vm.boot",
    "vm.delete",
    "vm.shutdown",
    "vm.reboot",
    "vm.pause",
    "vm.resume",
    "vm.power-button",
    "vm.nmi",
    "vm.cancel-migration",
    "vm.cancel-snapshot",
]


def test_every_command_that_takes_data_has_a_body_here():
    assert set(BODIES) == {command.name for command in COMMANDS if command.body is not None}
    assert {command.name for command in COMMANDS if command.body is None} == {
        *READING,
        *BODILESS,
        "vmm.shutdown",
    }


def body_of(answer):
    return answer.body if isinstance(answer, VmActionPayload) else msgspec.json.encode(answer)


@pytest.mark.parametrize("name", READING)
def test_get_answers_200_with_a_body(client, name):
    reply = client.ask("GET", name)
    assert (reply.status, bool(reply.body)) == (200, True)


@pytest.mark.parametrize("name", READING)
def test_get_ignores_a_body(client, name):
    assert client.ask("GET", name, b"not json").status == 200


@pytest.mark.parametrize("name", [name for name in CHANGING if name not in ("vmm.shutdown",)])
def test_put_answers_204_or_the_device(client, vmm, name):
    reply = client.ask("PUT", name, BODIES.get(name))
    answer = plain_answer(type(vmm.await_request(name)))
    expected = (204, b"") if answer == Empty() else (200, body_of(answer))
    assert (reply.status, reply.body) == expected


@pytest.mark.parametrize("name", [c.name for c in COMMANDS if c.answer is VmActionPayload and c.body])
def test_cold_add_answers_204(client, vmm, name):
    vmm.answer(name, VmActionPayload(None))
    reply = client.ask("PUT", name, BODIES[name])
    assert (reply.status, reply.body) == (204, b"")


def test_vmm_shutdown_answers_an_empty_200(client):
    assert client.ask("PUT", "vmm.shutdown").raw == (
        b"HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
        b"Content-Type: application/json\r\nContent-Length: 0\r\n\r\n"
    )


def test_vmm_shutdown_ignores_a_body(client):
    reply = client.ask("PUT", "vmm.shutdown", b"not json")
    assert (reply.status, reply.body) == (200, b"")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (method, name)
        for name in sorted(WORDY)
        for method in ("GET", "PUT", "PATCH", "DELETE")
        if method != ("GET" if name in READING else "PUT")
    ],
)
def test_wrong_method_on_an_early_endpoint_is_refused_in_words(client, vmm, method, name):
    reply = client.ask(method, name, BODIES.get(name))
    assert (reply.status, reply.body) == (400, BAD_REQUEST)
    assert vmm.names() == []


@pytest.mark.parametrize("name", PLAIN)
def test_get_for_put_and_put_for_get_are_refused_in_words(client, vmm, name):
    reply = client.ask("PUT" if name in READING else "GET", name, BODIES.get(name))
    assert (reply.status, reply.code, reply.body) == (400, "WrongMethod", BAD_REQUEST)
    assert vmm.names() == []


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
@pytest.mark.parametrize("name", PLAIN)
def test_patch_and_delete_are_refused_without_words(client, vmm, method, name):
    assert client.ask(method, name, BODIES.get(name)).raw == (
        b"HTTP/1.1 400 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
        b"X-Cloudvmm-Error: WrongMethod\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n"
    )
    assert vmm.names() == []


@pytest.mark.parametrize("name", BODILESS)
def test_body_where_none_belongs_is_refused(client, vmm, name):
    reply = client.ask("PUT", name, {})
    assert (reply.status, reply.code, reply.body) == (400, "BodyNotTaken", BAD_REQUEST)
    assert vmm.names() == []


@pytest.mark.parametrize("name", sorted(set(BODIES) - {"vm.create"}))
def test_missing_body_is_refused_in_words(client, vmm, name):
    reply = client.ask("PUT", name)
    assert (reply.status, reply.code, reply.body) == (400, "BodyMissing", BAD_REQUEST)
    assert vmm.names() == []


def test_missing_body_of_create_is_refused_without_words(client, vmm):
    reply = client.ask("PUT", "vm.create")
    assert (reply.status, reply.code, reply.body) == (400, "BodyMissing", b"")
    assert vmm.names() == []


@pytest.mark.parametrize("name", sorted(BODIES))
@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b"\xff", b'"x"', b"[" * 100_000])
def test_body_that_does_not_deserialize_is_refused_with_the_reason(client, vmm, name, body):
    reply = client.ask("PUT", name, body)
    assert reply.status == 400
    assert reply.code
    assert (reply.texts()[0], len(reply.texts())) == ("Failed to deserialize JSON", 2)
    assert vmm.names() == []


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/api/v1/",
        "/api/v1/vm.unknown",
        "/api/v1/vm.info/",
        "/api/v1/vm.info?x=1",
        "/api/v1/vm%2Einfo",
        "/api/v2/vm.info",
        "//api/v1/vm.info",
        "/API/v1/vm.info",
        "vm.info",
        "*",
        "https://localhost/api/v1/vm.info",
        "http://localhost",
    ],
)
def test_unknown_path_is_not_found(client, method, target):
    client.send(f"{method} {target} HTTP/1.1\r\n\r\n".encode())
    reply = client.reply()
    assert (reply.status, reply.body) == (404, b'["Not Found"]')


def test_absolute_form_is_found(client):
    client.send(b"GET http://localhost/api/v1/vmm.ping HTTP/1.1\r\n\r\n")
    assert client.reply().status == 200


def test_answer_of_another_kind_is_an_error_and_not_a_success(client, vmm):
    vmm.answer("vmm.ping", Empty())
    reply = client.ping()
    assert (reply.status, reply.texts()) == (500, ["Error from API", "Wrong response payload type"])


def test_ping_and_info_are_written_as_json(client):
    assert client.ping().body == (
        b'{"build_version":"v54.0.0","version":"54.0.0","pid":7,"features":["io_uring","kvm"]}'
    )
    info = client.ask("GET", "vm.info").body
    assert b'"state":"Created","memory_actual_size":536870912' in info
    assert b"null" not in info
    assert b"device_tree" not in info


def test_answers_are_the_kinds_the_table_says():
    kinds = {
        *(Empty, VmActionPayload, VmForkResponse, VmInfo, VmMigrationProgress, VmmPingResponse),
        *(VmmJobs, VmSnapshotProgress),
    }
    assert {command.answer for command in COMMANDS} == kinds
