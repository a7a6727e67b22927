"""Everything that names commands names the same ones: those of `cloudvmm.api.COMMANDS`, and its streams.

Each place is asked for its own list, in its own spelling; names are turned back into those on the wire.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import msgspec
import pytest

import cloudvmm
from cloudvmm import api, client
from cloudvmm.api import COMMANDS, STREAMS, call
from cloudvmm.cli.remote.command import SUBCOMMANDS
from cloudvmm.config import form
from cloudvmm.control.vmm import VmmThread
from cloudvmm.dbus.method import METHODS
from cloudvmm.engine.fake import FakeEngine
from cloudvmm.http.openapi import document
from cloudvmm.http.path import ROOT
from cloudvmm.http.route import ROUTES
from cloudvmm.http.sample import SAMPLES

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = [command.name for command in COMMANDS]
STREAM_NAMES = [stream.name for stream in STREAMS]
PYTHON_NAMES = {re.sub("[.-]", "_", name): name for name in NAMES}
CAMEL_NAMES = {"".join(word.capitalize() for word in re.split("[.-]", name)): name for name in NAMES}

# Shut out of the reference's D-Bus interface, or not in the reference; and shut out of its actions on the VM.
NOT_ON_DBUS = {
    *("vm.nmi", "vm.resize-disk", "vm.migration-progress", "vm.cancel-migration"),
    *("vm.fork", "vm.snapshot-progress", "vm.cancel-snapshot", "vmm.jobs", "vmm.cancel-job"),
}
NOT_AN_ACTION = {"vmm.ping", "vmm.shutdown", "vmm.jobs", "vmm.cancel-job", "vm.info", "vm.create"}


def in_python(names):
    """Turn names of functions back; one that is nobody's stays as it is."""
    return [PYTHON_NAMES.get(name, name) for name in names if re.match("vmm?_", name)]


def methods_of(kind):
    return in_python(name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_"))


def by_functions():
    return in_python(name for name in vars(call) if name != "vm_action")


def by_exported_functions():
    return in_python(name for name in api.__all__ if name != "vm_action")


def by_actions():
    return [*(variant.value.name for variant in api.VmAction), *NOT_AN_ACTION]


def by_control():
    """Give the commands that the VMM thread answers, be it with an error of theirs."""
    return [command.name for command in COMMANDS if is_answered(command)]


def is_answered(command):
    body = SAMPLES.get(command.name, {}) | ({"receiver_url": "nowhere"} if "receive" in command.name else {})
    data = command.body and form.decode(msgspec.json.encode(body), command.body)
    vmm = VmmThread(FakeEngine())
    try:
        return isinstance(api.send_request(vmm.api_evt, vmm.api_sender, command, data), command.answer)
    except command.error:
        return True
    finally:
        vmm.exit_evt.write()
        vmm.join()
        vmm.close()


def by_routes():
    return [path.removeprefix(ROOT) for path in ROUTES]


def by_openapi():
    paths = [path[1:] for path in document()["paths"]]
    assert set(paths) - set(NAMES) == {*STREAM_NAMES, "openapi.json"}
    return [path for path in paths if path in NAMES]


def by_reference_pages():
    pages = (path.read_text(encoding="utf-8") for path in (DOCS / "reference" / "api").glob("*.md"))
    sections = [name for page in pages for name in re.findall(r"^## (vmm?\..*)$", page, re.MULTILINE)]
    assert set(sections) - set(NAMES) == set(STREAM_NAMES)
    return [name for name in sections if name in NAMES]


def by_dbus():
    return [*(CAMEL_NAMES.get(name, name) for name in METHODS), *NOT_ON_DBUS]


def by_client():
    return methods_of(client.Client)


def by_async_client():
    return methods_of(client.AsyncClient)


def by_vmm():
    return methods_of(cloudvmm.Vmm)


def by_client_table():
    return [command.name for command in client.COMMANDS]


def by_remote():
    return [one.api_command for one in SUBCOMMANDS if one.api_command not in STREAM_NAMES]


LISTS = {
    "functions": by_functions,
    "exported functions": by_exported_functions,
    "actions": by_actions,
    "control": by_control,
    "routes": by_routes,
    "OpenAPI": by_openapi,
    "reference pages": by_reference_pages,
    "dbus": by_dbus,
    "client": by_client,
    "async client": by_async_client,
    "Vmm": by_vmm,
    "table of the client": by_client_table,
    "remote": by_remote,
}


@pytest.mark.parametrize("place", LISTS)
def test_commands_of_the_place_are_those_of_the_list(place):
    assert sorted(LISTS[place]()) == sorted(NAMES)


def test_commands_that_d_bus_lacks_are_those_that_the_list_says():
    assert {command.name for command in COMMANDS if not command.is_on_dbus} == NOT_ON_DBUS


def test_no_stream_has_the_name_of_a_command():
    assert set(STREAM_NAMES).isdisjoint(NAMES)
