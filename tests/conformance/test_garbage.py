"""What no client should send: random bytes, and every member of every struct with the wrong type."""

import random

import msgspec
import pytest
from msgspec import inspect as kinds

from cloudvmm.api import COMMANDS
from support.deadline import HOST_S
from support.member import SAMPLES, accepted, all_members, minimal
from support.rest import RestClient
from support.wait import wait_until


def test_every_member_of_the_vm_s_config_is_tried():
    paths = {param.id for param in all_members()}
    assert {"vm.create.disks.path", "vm.create.cpus.topology.cores_per_die", "vm.create.net.mac"} <= paths
    assert len(paths) > 250


@pytest.mark.parametrize("name", [command.name for command in COMMANDS if command.body is not None])
def test_smallest_body_is_accepted(client, name):
    body = next(minimal(kinds.type_info(c.body)) for c in COMMANDS if c.name == name)
    assert client.ask("PUT", name, body).status in (200, 204)


@pytest.mark.parametrize(("name", "kind", "whole"), list(all_members()))
def test_wrong_type_in_any_member_is_refused_with_its_reason(client, vmm, name, kind, whole):
    for wrong in SAMPLES.keys() - accepted(kind):
        reply = client.ask("PUT", name, msgspec.json.encode(whole(SAMPLES[wrong])))
        assert reply.status == 400, (wrong, reply)
        assert reply.texts()[0] == "Failed to deserialize JSON"
    assert vmm.names() == []
    assert client.ping().status == 200


def integers():
    """Members that hold a number, those of descriptors included: they are thrown away, but read as i32."""
    for param in all_members():
        if "int" in accepted(param.values[1]):
            yield param


@pytest.mark.parametrize(("name", "kind", "whole"), list(integers()))
def test_integer_that_no_member_can_hold_is_refused_with_its_reason(client, vmm, name, kind, whole):
    for number in (2**64, 2**70, -(2**31) - 1):
        reply = client.ask("PUT", name, msgspec.json.encode(whole(msgspec.Raw(b"%d" % number))))
        assert (reply.status, reply.texts()[0]) == (400, "Failed to deserialize JSON"), number
    assert vmm.names() == []


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_stop_nothing(server, socket_path, seed):
    noise = random.Random(seed)
    with RestClient(socket_path) as client:
        for _ in range(50):
            client.socket.sendall(noise.randbytes(noise.randrange(1, 3000)) + b"\r\n")
    wait_until(lambda: server.connection_count == 0, "the connection's end", timeout_s=HOST_S)
    with RestClient(socket_path) as client:
        assert client.ping().status == 200


@pytest.mark.parametrize("seed", range(20))
def test_request_with_flipped_bytes_stops_nothing(server, socket_path, seed):
    noise = random.Random(seed)
    raw = b'PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: 19\r\n\r\n{"desired_vcpus":2}'
    for _ in range(30):
        broken = bytearray(raw)
        for _ in range(noise.randrange(1, 6)):
            broken[noise.randrange(len(broken))] = noise.randrange(256)
        with RestClient(socket_path) as client:
            client.send(bytes(broken))
    with RestClient(socket_path) as client:
        assert client.ping().status == 200
