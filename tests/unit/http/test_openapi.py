"""The API's document: valid, current, and true to the types and the routes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema_rs
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from cloudvmm import api
from cloudvmm.api import COMMANDS, EventFd, api_channel
from cloudvmm.api.fleet import DAEMON_COMMANDS
from cloudvmm.config import form
from cloudvmm.config.meaning import MEANING, meaning_of
from cloudvmm.config.vm import VmConfig
from cloudvmm.http.exchange import Exchange
from cloudvmm.http.openapi import document
from cloudvmm.http.route import answer
from cloudvmm.http.sample import SAMPLES
from cloudvmm.http.schema import sent_schemas
from cloudvmm.http.service import VmmService
from cloudvmm.wire.http import Request
from support.member import minimal

ROOT = Path(__file__).resolve().parents[3]
BODIES = {command.name: command.body for command in COMMANDS if command.body is not None}
DOCUMENT = document()
SCHEMAS = DOCUMENT["components"]["schemas"]


def script():
    spec = importlib.util.spec_from_file_location("write_openapi", ROOT / "scripts" / "write_openapi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def validator(name):
    whole = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return jsonschema_rs.Draft202012Validator(whole)


def structs():
    """Every struct that a client can send, by its name."""
    found, waiting = {}, list(BODIES.values())
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and not hasattr(kind, "__origin__"):
            found[kind.__name__] = kind
            waiting += [field.type for field in msgspec.structs.fields(kind)]
        else:
            waiting += getattr(kind, "__args__", ())
    return found


@pytest.fixture
def exchange():
    sender, _ = api_channel()
    event = EventFd()
    service = VmmService(event, sender)
    yield Exchange(service)
    service.close()
    event.close()


def test_document_is_valid_openapi():
    validate(DOCUMENT, cls=OpenAPIV31SpecValidator)


def test_file_is_what_the_script_writes():
    for path, text in script().render().items():
        assert path.read_bytes() == text, "out of date: run scripts/write_openapi.py"


def test_check_fails_on_a_file_that_is_old(tmp_path, monkeypatch):
    module = script()
    (tmp_path / "openapi.json").write_text("{}")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    assert module.main(["--check"]) == 1
    assert module.main([]) == 0
    assert module.main(["--check"]) == 0


def test_document_is_served(exchange):
    head, _, body = answer(Request("GET", "/api/v1/openapi.json", None), [], exchange).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 \r\n")
    assert json.loads(body) == DOCUMENT


def test_document_is_not_to_be_changed(exchange):
    refused = answer(Request("PUT", "/api/v1/openapi.json", b"{}"), [], exchange)
    assert refused.startswith(b"HTTP/1.1 400 \r\n")


def test_server_that_nobody_asks_does_not_load_it():
    program = "import sys, cloudvmm.http; print([n for n in sys.modules if n in {'cloudvmm.http.openapi', \
'cloudvmm.http.schema', 'cloudvmm.http.sample', 'cloudvmm.config.meaning'}])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", BODIES)
def test_sample_is_what_the_command_takes(name):
    body = msgspec.json.encode(SAMPLES[name])
    form.decode(body, BODIES[name])
    assert validator(BODIES[name].__name__).is_valid(SAMPLES[name])


def test_there_is_a_sample_for_each_body():
    assert set(SAMPLES) == set(BODIES)


@pytest.mark.parametrize("name", structs())
def test_members_of_a_struct_are_those_of_its_schema(name):
    fields = msgspec.structs.fields(structs()[name])
    current = {key for key, value in SCHEMAS[name]["properties"].items() if not value.get("deprecated")}
    assert current == {field.encode_name for field in fields}
    assert SCHEMAS[name]["required"] == [field.encode_name for field in fields if field.required]


@pytest.mark.parametrize("name", structs())
def test_default_in_the_document_is_the_one_that_decoding_gives(name):
    kind = structs()[name]
    plain = minimal(msgspec.inspect.type_info(kind))
    given = {
        member: schema["default"]
        for member, schema in SCHEMAS[name]["properties"].items()
        if "default" in schema and member not in plain
    }
    assert form.decode_saved(json.dumps(given | plain).encode(), kind) == form.decode_saved(
        json.dumps(plain).encode(), kind
    )


@pytest.mark.parametrize("name", structs())
def test_every_member_has_its_meaning_and_there_are_no_others(name):
    fields = msgspec.structs.fields(structs()[name])
    assert all(meaning_of(structs()[name], field.name) for field in fields)
    assert set(MEANING.get(name, ())) <= {field.name for field in fields}


def test_meanings_are_of_structs_that_exist():
    of_daemons = {command.body.__name__ for command in DAEMON_COMMANDS if command.body is not None}
    assert set(MEANING) <= {*structs(), *of_daemons, "PciDevice"}


@pytest.mark.parametrize(
    ("kind", "name"), [(api.VmInfo, "VmInfo"), (api.DeviceNode, "DeviceNode"), (VmConfig, "VmConfigTold")]
)
def test_told_members_are_the_type_s(kind, name):
    assert set(SCHEMAS[name]["properties"]) == {field.name for field in msgspec.structs.fields(kind)}


def test_vm_info_of_a_full_config_is_in_the_document():
    config = form.decode(json.dumps(full(VmConfig)).encode(), VmConfig)
    info = api.VmInfo(config=config, state=api.VmState.RUNNING, memory_actual_size=1)
    errors = [error.message for error in validator("VmInfo").iter_errors(json.loads(form.encode(info)))]
    assert errors == []


def test_vm_info_that_lacks_a_member_is_not_in_the_document():
    info = api.VmInfo(config=VmConfig(), state=api.VmState.RUNNING, memory_actual_size=1)
    told = json.loads(form.encode(info))
    assert validator("VmInfo").is_valid(told)
    del told["config"]["cpus"]["boot_vcpus"]
    assert not validator("VmInfo").is_valid(told)


def full(kind):
    """Return a value of the struct `kind` in which every member at any depth is given."""
    values = {}
    for name, schema in sent_schemas([kind])[kind.__name__]["properties"].items():
        if not schema.get("deprecated"):
            values[name] = full_value(schema, name)
    return values


def full_value(schema, name):
    if "anyOf" in schema and "type" not in schema:
        return full_value(schema["anyOf"][0], name)
    if "$ref" in schema:
        inner = schema["$ref"].rpartition("/")[2]
        if "enum" in SCHEMAS[inner]:
            return SCHEMAS[inner]["enum"][0]
        return {key: full_value(one, key) for key, one in SCHEMAS[inner]["properties"].items()
                if not one.get("deprecated")}  # fmt: skip
    if schema["type"] == "array":
        return [full_value(schema["items"], name)]
    texts = {"mac": "2e:00:00:00:00:01", "host_mac": "2e:00:00:00:00:02", "ip": "10.0.0.1", "mask": "fe80::1"}
    return {"string": texts.get(name, "x"), "integer": 7, "boolean": True}[schema["type"]]


def test_integers_have_both_ends():
    integers = []

    def walk(value):
        if isinstance(value, dict):
            integers.extend([value] if value.get("type") == "integer" else [])
            for one in value.values():
                walk(one)
        elif isinstance(value, list):
            for one in value:
                walk(one)

    walk({name: SCHEMAS[name] for name in structs()})
    ends = {(one["minimum"], one["maximum"]) for one in integers}
    assert ends - {(1, 2**64 - 1), (1, 2**32 - 1)} == {
        (-(2**31), 2**31 - 1),
        *((0, 2**bits - 1) for bits in (8, 16, 32, 64)),
    }


def test_every_path_can_answer_that_there_are_too_many_connections_and_that_it_failed():
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            assert {"400", "500", "503"} <= set(operation["responses"])


def test_refusal_of_the_grammar_is_among_the_bodies():
    (pattern,) = DOCUMENT["components"]["responses"]["BadRequest"]["x-bodies"]
    body = '{ "error": "Invalid request.\nAll previous unanswered requests will be dropped." }'
    assert re.search(pattern, body)
