"""What no client should send: random bytes, and every member of every struct with the wrong type."""

import random

import msgspec
import pytest
from msgspec import inspect as kinds

from cloudvmm.api import COMMANDS
from support.rest import RestClient
from support.wait import wait_until

SAMPLES = {"null": None, "bool": True, "int": -1, "float": 1.5, "str": "\u0000?", "array": [[]], "object": {}}
JSON_KINDS = {
    kinds.AnyType: set(SAMPLES),
    kinds.NoneType: {"null"},
    kinds.BoolType: {"bool"},
    kinds.IntType: {"int"},
    kinds.FloatType: {"float", "int"},
    kinds.StrType: {"str"},
    kinds.EnumType: {"str"},
    kinds.LiteralType: {"str"},
    kinds.ListType: {"array"},
    kinds.VarTupleType: {"array"},
    kinds.TupleType: {"array"},
    kinds.DictType: {"object"},
    kinds.StructType: {"object"},
}


def accepted(kind) -> set[str]:
    """Return the kinds of JSON value that a member of type `kind` may have."""
    if isinstance(kind, kinds.Metadata):
        return accepted(kind.type)
    if isinstance(kind, kinds.UnionType):
        return set().union(*map(accepted, kind.types))
    return JSON_KINDS[type(kind)]


def minimal(kind):
    """Return the smallest value of type `kind`, as JSON."""
    if isinstance(kind, kinds.Metadata):
        return minimal(kind.type)
    if isinstance(kind, kinds.UnionType):
        return minimal(next(one for one in kind.types if not isinstance(one, kinds.NoneType)))
    if isinstance(kind, kinds.StructType):
        return {field.encode_name: minimal(field.type) for field in kind.fields if field.required}
    if isinstance(kind, kinds.EnumType):
        return next(iter(kind.cls)).value
    return {"bool": False, "int": 1, "str": "x", "array": [], "object": {}}[next(iter(accepted(kind)))]


def inner_structs(kind):
    """Yield each struct that a value of type `kind` can hold directly, and how to wrap a value of it."""
    if isinstance(kind, kinds.Metadata):
        yield from inner_structs(kind.type)
    elif isinstance(kind, kinds.UnionType):
        for one in kind.types:
            yield from inner_structs(one)
    elif isinstance(kind, kinds.ListType):
        for struct, wrap in inner_structs(kind.item_type):
            yield struct, lambda value, wrap=wrap: [wrap(value)]
    elif isinstance(kind, kinds.StructType):
        yield kind, lambda value: value


def members(struct, path, wrap):
    """Yield (path, type, function from a value to the whole body) for every member, at any depth."""
    for field in struct.fields:

        def whole(value, name=field.encode_name):
            return wrap({**minimal(struct), name: value})

        here = f"{path}.{field.encode_name}"
        yield here, field.type, whole
        for inner, inner_wrap in inner_structs(field.type):

            def around(value, whole=whole, inner_wrap=inner_wrap):
                return whole(inner_wrap(value))

            yield from members(inner, here, around)


def all_members():
    for command in COMMANDS:
        if command.body is not None:
            for path, kind, whole in members(
                kinds.type_info(command.body), command.name, lambda value: value
            ):
                yield pytest.param(command.name, kind, whole, id=path)


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
    """Members that hold a number which means something; numbers of descriptors are thrown away unread."""
    for param in all_members():
        if "int" in accepted(param.values[1]) and not param.id.endswith("fd"):
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
    wait_until(lambda: server.connection_count == 0, "the connection's end", timeout_s=5)
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
