"""Everything that names a daemon's own commands names the same ones: those of `DAEMON_COMMANDS`."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from cloudvmm import api
from cloudvmm.api.fleet import DAEMON_COMMANDS
from cloudvmm.cli import vms
from cloudvmm.client import AsyncDaemonClient, DaemonClient
from cloudvmm.client import daemon as table
from cloudvmm.daemon.service import DaemonService
from cloudvmm.http.daemon_openapi import SAMPLES, document, document_json
from cloudvmm.http.path import ROOT

DOCS = Path(__file__).resolve().parents[3] / "docs"
NAMES = [command.name for command in DAEMON_COMMANDS]
CLIENTS = [DaemonClient, AsyncDaemonClient]


def method_name(name):
    return re.sub("[.-]", "_", name)


def test_no_name_is_one_of_a_vmms():
    assert set(NAMES).isdisjoint(command.name for command in (*api.COMMANDS, *api.STREAMS))


def test_routes_and_handlers_are_those_of_the_list():
    service = DaemonService(None, lambda: None)

    assert {path.removeprefix(ROOT) for path in service.routes} == set(NAMES)
    assert set(service._handlers) == set(DAEMON_COMMANDS)


def test_table_of_the_client_is_the_list():
    assert [command.name for command in table.DAEMON_COMMANDS] == NAMES
    for command, listed in zip(table.DAEMON_COMMANDS, DAEMON_COMMANDS, strict=True):
        assert command.method == ("GET" if listed.effect is api.Effect.READS else "PUT")
        assert command.answer == (None if listed.answer is api.Empty else listed.answer.__name__)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("command", DAEMON_COMMANDS, ids=lambda command: command.name)
def test_each_command_has_its_method(client, command):
    method = getattr(client, method_name(command.name))
    _, *parameters = inspect.signature(method).parameters.values()

    wanted = [] if command.body is None else [command.body.__name__]
    assert [parameter.annotation for parameter in parameters] == wanted
    assert inspect.signature(method).return_annotation == (
        "None" if command.answer is api.Empty else command.answer.__name__
    )
    assert inspect.iscoroutinefunction(method) is (client is AsyncDaemonClient)
    assert method.__doc__


@pytest.mark.parametrize("client", CLIENTS)
def test_no_method_is_without_a_command(client):
    named = {name for name in vars(client) if name.startswith(("vmms_", "daemon_"))}

    assert named == {method_name(name) for name in NAMES}


def test_each_command_has_its_sub_command():
    assert sorted(command.api_command for command in vms.COMMANDS) == sorted(NAMES)
    names = [command.name for command in vms.COMMANDS]
    assert names == sorted(names)
    assert names == [command.api_command.partition(".")[2] for command in vms.COMMANDS]


def test_document_is_valid_and_has_each_command():
    validate(document(), cls=OpenAPIV31SpecValidator)

    assert [path[1:] for path in document()["paths"]] == [*NAMES, "openapi.json"]
    assert json.loads(document_json()) == json.loads(msgspec.json.encode(document()))
    assert set(SAMPLES) == {command.name for command in DAEMON_COMMANDS if command.body is not None}


def test_page_has_a_section_for_each_command():
    page = (DOCS / "reference" / "daemon.md").read_text(encoding="utf-8")

    assert re.findall(r"^## ([a-z]+\.[a-z-]+)$", page, re.MULTILINE) == NAMES
