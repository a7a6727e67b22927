"""Garbage on the socket of a real process: each gets its answer, and the process goes on."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from support.attack import Held, assert_holds_no_more, see_out
from support.deadline import HOST_S
from support.member import SAMPLES, accepted, all_members
from support.rest import RestClient, request_bytes
from support.server import Server
from support.vm import EngineChoice
from support.wait import wait_until

TOO_MANY = (
    b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\n"
    b"X-Cloudvmm-Error: TooManyConnections\r\nContent-Length: 40\r\n\r\n"
    b'{ "error": "Too many open connections" }'
)
MIB = 1 << 20


@pytest.fixture
def attacked(fake_engine: EngineChoice, server: Server) -> Iterator[Server]:
    """A server that must hold no more after the test than before, and still carry a VM."""
    server.vmm.put("vm.create", {"payload": {"kernel": "/nowhere"}})
    server.vmm.put("vm.delete")
    before = Held(server.pid)
    yield server
    server.vmm.put("vm.create", {"payload": {"kernel": "/nowhere"}})
    assert server.vmm.get("vm.info")["state"] == "Created"
    server.vmm.put("vm.delete")
    assert_holds_no_more(server.pid, before)


def connect_ten(server: Server, stack: contextlib.ExitStack) -> list[RestClient]:
    """Take every place that there is."""
    server.vmm.close()

    def has_room() -> bool:
        with server.vmm.connect() as client:
            return client.ping().status == 200

    wait_until(has_room, "there is room", timeout_s=HOST_S)
    clients = [stack.enter_context(server.vmm.connect()) for _ in range(10)]
    for client in clients:
        assert client.ping().status == 200
    return clients


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_stop_nothing(attacked: Server, seed: int) -> None:
    noise = random.Random(seed)
    for _ in range(20):
        with attacked.vmm.connect() as client, contextlib.suppress(OSError):
            for _ in range(noise.randrange(1, 20)):
                client.send(
                    noise.randbytes(noise.randrange(1, 3000)) + noise.choice([b"", b"\r\n", b"\r\n\r\n"])
                )
    attacked.vmm.get("vmm.ping")


@pytest.mark.parametrize("seed", range(5))
def test_requests_with_flipped_bytes_stop_nothing(attacked: Server, seed: int) -> None:
    noise = random.Random(seed)
    raw = request_bytes("PUT", "/api/v1/vm.create", {"cpus": {"boot_vcpus": 1, "max_vcpus": 1}})
    for _ in range(60):
        broken = bytearray(raw)
        for _ in range(noise.randrange(1, 8)):
            broken[noise.randrange(len(broken))] = noise.randrange(256)
        with attacked.vmm.connect() as client:
            client.send(bytes(broken))
            see_out(client)
    attacked.vmm.put("vm.delete")


def test_bodies_of_five_mebibytes_from_ten_clients_are_each_refused(attacked: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = connect_ten(attacked, stack)
        for client in clients:
            client.send(request_bytes("PUT", "/api/v1/vm.create", b"x" * (5 * MIB)))
        for client in clients:
            reply = client.reply()
            assert reply.status == 400
            assert b"Request payload with size 5242880 is larger than the limit of 4194304" in reply.body
            assert client.ping().status == 200


def test_bodies_of_four_mebibytes_of_nonsense_are_each_refused(attacked: Server) -> None:
    for body in (
        b"[" * (4 * MIB),
        b"{" * (4 * MIB),
        b'"' + b"\\u0000" * 600000 + b'"',
        b"9" * (4 * MIB),
        b"\0" * MIB,
    ):
        with attacked.vmm.connect() as client:
            reply = client.ask("PUT", "vm.create", body)
            assert (reply.status, reply.texts()[0]) == (400, "Failed to deserialize JSON")


def test_body_cut_short_holds_up_nobody(attacked: Server) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(9):
            half = stack.enter_context(attacked.vmm.connect())
            half.send(request_bytes("PUT", "/api/v1/vm.create", b"{" * 1000)[: 20 + 100 * number])
        attacked.vmm.get("vmm.ping")


def test_eleventh_client_is_turned_away_in_the_reference_s_words(attacked: Server) -> None:
    with contextlib.ExitStack() as stack:
        clients = connect_ten(attacked, stack)
        for _ in range(3):
            with RestClient(attacked.socket_path) as eleventh:
                assert eleventh.socket.recv(4096) == TOO_MANY
                assert eleventh.is_closed()
        assert [client.ping().status for client in clients] == [200] * 10


def test_wrong_type_in_every_member_of_every_body_is_refused(attacked: Server) -> None:
    tried = 0
    for param in all_members():
        name, kind, whole = param.values
        for wrong in sorted(SAMPLES.keys() - accepted(kind)):
            reply = attacked.vmm.exchange("PUT", name, whole(SAMPLES[wrong]))
            assert reply.status == 400, (param.id, wrong, reply)
            assert reply.texts()[0] == "Failed to deserialize JSON"
            tried += 1
    assert tried > 1000
    assert attacked.vmm.put("vm.boot", expect=404)[-1] == "VM config is missing"


@pytest.mark.parametrize(
    "hostile",
    [
        {"disks": [{"path": "\0"}]},
        {"disks": [{"path": "/" + "d" * 100000}]},
        {"memory": {"size": 2**64 - 1}},
        {"memory": {"size": 0}},
        {"cpus": {"boot_vcpus": 0, "max_vcpus": 0}},
        {"cpus": {"boot_vcpus": 2**32 - 1, "max_vcpus": 2**32 - 1}},
        {"rng": {"src": "\0"}},
        {"serial": {"mode": "File", "file": "/nonexistent/x"}},
        {"serial": {"mode": "File", "file": "\0"}},
        {"serial": {"mode": "Socket", "socket": "/" + "s" * 300}},
        {"serial": {"mode": "Socket", "socket": "\0"}},
        {"console": {"mode": "File", "file": "/dev"}},
        {"payload": {"kernel": "\0", "cmdline": "\0"}},
        {"payload": {"kernel": "/dev/zero"}},
        {"net": [{"tap": "x" * 1000}, {"tap": "\0"}]},
        {"disks": [{"path": "/dev/null", "id": "d"}] * 300},
    ],
    ids=str,
)
def test_well_formed_but_hostile_config_is_refused_or_boots_and_stops_nothing(
    any_engine: EngineChoice, server: Server, hostile: dict[str, Any]
) -> None:
    config = {"payload": {"kernel": "/nowhere"}, **hostile}
    replies = [server.vmm.exchange("PUT", "vm.create", config), server.vmm.exchange("PUT", "vm.boot")]
    assert replies[0].status in (204, 500)
    assert replies[1].status in (204, 400, 404, 409, 500)
    for reply in replies:
        assert reply.status == 204 or reply.texts()[0] == "Error from API"
    server.vmm.get("vmm.ping")
    server.vmm.put("vm.delete")
    assert server.vmm.exchange("GET", "vm.info").status == 404


def test_descriptors_sent_with_garbage_are_closed(attacked: Server) -> None:
    read_fd, write_fd = os.pipe()
    try:
        for raw in (b"garbage\r\n", request_bytes("PUT", "/api/v1/vm.boot"), b"GET /api", b"\0" * 100):
            with attacked.vmm.connect() as client:
                client.send(raw, [read_fd] * 100)
        client = attacked.vmm.connect()
        with client:
            client.send(request_bytes("PUT", "/api/v1/vm.create", b"["), [write_fd] * 253)
            assert client.reply().status == 400
    finally:
        os.close(read_fd)
        os.close(write_fd)
