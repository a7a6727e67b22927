"""The API's document: OpenAPI 3.1, made from the table of commands and the types that they take and answer.

Whatever the server can send is in it, also where Cloud Hypervisor's own document says otherwise. Members that
start with `x-` say what OpenAPI cannot: bodies under `application/json` that are no JSON.

Imported only where somebody asks for the document: a server that nobody asks does not pay for it.
"""

from __future__ import annotations

import functools
from typing import Final

import msgspec

from cloudvmm import __version__
from cloudvmm.api import COMMANDS, STREAMS, ApiRequest, Stream, VmActionPayload, VmInfo, VmmPingResponse
from cloudvmm.api.data import (
    AddressRange,
    PciBarResource,
    PciDeviceInfo,
    VmForkResponse,
    VmMigrationProgress,
    VmmJobs,
    VmSnapshotProgress,
)
from cloudvmm.config.vm import VmConfig
from cloudvmm.http.component import (
    EMPTY_BODY,
    answer,
    error_schemas,
    headers,
    heading,
    object_schema,
    ref,
    response_ref,
    responses,
)
from cloudvmm.http.path import ROOT
from cloudvmm.http.route import DOCUMENT_PATH, ROUTES
from cloudvmm.http.sample import SAMPLES
from cloudvmm.http.schema import Schema, first_paragraph, sent_schemas, told_schemas

_JSON: Final = "application/json"
TAGS: Final = {
    "vmm": "The VMM itself",
    "life": "The life of a VM",
    "information": "What there is to know",
    "sizes": "Sizes",
    "devices": "Devices",
    "state": "Snapshot, restore, coredump, migration",
    "document": "This document",
}
_TAG_OF: Final = {
    "vmm.ping": "vmm",
    "vmm.shutdown": "vmm",
    "vmm.jobs": "vmm",
    "vmm.cancel-job": "vmm",
    "vm.info": "information",
    "vm.counters": "information",
    "vm.events": "information",
    "vm.resize": "sizes",
    "vm.resize-disk": "sizes",
    "vm.resize-zone": "sizes",
    "vm.remove-device": "devices",
    "vm.snapshot": "state",
    "vm.fork": "state",
    "vm.restore": "state",
    "vm.coredump": "state",
    "vm.receive-migration": "state",
    "vm.send-migration": "state",
    "vm.migration-progress": "state",
    "vm.cancel-migration": "state",
    "vm.snapshot-progress": "state",
    "vm.cancel-snapshot": "state",
}
# What is told as an object of its own.
_TOLD: Final = (VmInfo, VmmPingResponse, VmMigrationProgress, VmSnapshotProgress, VmForkResponse, VmmJobs)
# Statuses besides success, 400, 500 and 503, which every path can answer.
_NOT_THERE: Final = ("vm.info", "vm.boot", "vm.reboot", "vm.resize", "vm.resize-disk", "vm.resize-zone",
                     "vm.remove-device", "vmm.cancel-job")  # fmt: skip
_IN_CONFLICT: Final = ("vm.boot", "vm.reboot", "vm.restore")

_INFO: Final = f"""\
Cloud Hypervisor's REST API on a UNIX socket, as cloudvmm {__version__} serves it. Names that Cloud Hypervisor
does not have are extensions.

Where a description says N, C or A: there is no VM (N), there is a stored configuration alone (C), there is a
VM object, from `vm.boot` on (A).

Any method but the one given here answers 400: with `["Bad Request"]`, or without a body (some paths do so
for PATCH and DELETE). Any other path answers 404 `["Not Found"]`. A body may not be sent where none is
described, except with `vmm.shutdown` and with GET, which ignore it. The status line has no reason phrase.
`Expect: 100-continue` is answered with an interim 100. Requests may carry file descriptors (SCM_RIGHTS)."""


def document() -> Schema:
    """Return the whole document as plain values."""
    schemas = _schemas()
    paths: Schema = {
        f"/{command.name}": {ROUTES[ROOT + command.name].method.lower(): _operation(command)}
        for command in COMMANDS
    }
    paths |= {f"/{stream.name}": {"get": _stream_operation(stream)} for stream in STREAMS}
    paths["/" + DOCUMENT_PATH.removeprefix(ROOT)] = {"get": _own_operation()}
    return {
        **heading("cloudvmm", _INFO),
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {"schemas": schemas, "responses": responses(), "headers": headers()},
    }


@functools.cache
def document_json() -> bytes:
    """Return the document as it is served."""
    return msgspec.json.encode(document())


def tag_of(name: str) -> str:
    """Return the name of the group that the command or stream `name` is described in."""
    return _TAG_OF.get(name) or ("devices" if name.startswith("vm.add-") else "life")


def python_name(name: str) -> str:
    """Return the name of the function in `cloudvmm.api` for the command or stream `name`."""
    return name.replace(".", "_").replace("-", "_")


# Operations


def _operation(command: type[ApiRequest]) -> Schema:
    summary, _, rest = first_paragraph(command.__doc__).partition(". ")
    operation: Schema = {
        "operationId": python_name(command.name),
        "tags": [tag_of(command.name)],
        "summary": summary.rstrip("."),
        "description": rest or summary,
        "responses": _success(command) | _failures(command),
    }
    if command.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {_JSON: {"schema": ref(command.body.__name__), "example": SAMPLES[command.name]}},
        }
        operation["responses"] = {"100": response_ref("Continue")} | operation["responses"]
    return operation


def _success(command: type[ApiRequest]) -> Schema:
    done = {"204": {"description": "Done"}}
    match command.name, command.answer:
        case "vmm.shutdown", _:
            return {"200": {"description": "Done; the body is empty", "x-bodies": [EMPTY_BODY]}}
        case "vm.counters", _:
            return {"200": answer("What each device has counted", ref("VmCounters"))}
        case _, kind if kind in _TOLD:
            return {"200": answer("The answer", ref(kind.__name__))}
        case _, kind if kind is VmActionPayload:
            device = answer("The device was added to the VM object", ref("PciDeviceInfo"))
            return {"200": device, "204": {"description": "The device was added to the stored configuration"}}
        case _:
            return done


def _failures(command: type[ApiRequest]) -> Schema:
    name = command.name
    is_adding = name.startswith("vm.add-")
    failures = {"400": response_ref("BadRequestOrNothing" if name == "vm.create" else "BadRequest")}
    if is_adding or name in _NOT_THERE:
        failures["404"] = response_ref("NotThere")
    if is_adding or name in _IN_CONFLICT:
        failures["409"] = response_ref("Conflict")
    if name == "vm.resize":
        failures["429"] = response_ref("Pending")
    return failures | {"500": response_ref("Failed"), "503": response_ref("Full")}


def _stream_operation(stream: type[Stream]) -> Schema:
    number = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}
    return {
        "operationId": python_name(stream.name),
        "tags": [tag_of(stream.name)],
        "summary": "Follow the events",
        "description": first_paragraph(stream.__doc__),
        "parameters": [
            {
                "name": "from",
                "in": "query",
                "description": "Begin with the event of this number, as far as it is kept",
                "schema": number,
            },
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "Begin behind the event of this number; wins over `from`",
                "schema": number,
            },
        ],
        "responses": {
            "200": {
                "description": "Server-sent events, until either side ends",
                "content": {"text/event-stream": {"schema": {"type": "string"}}},
            },
            "400": response_ref("BadRequest"),
            "500": response_ref("Failed"),
            "503": response_ref("FullOrTooManyStreams"),
        },
    }


def _own_operation() -> Schema:
    return {
        "operationId": "openapi_json",
        "tags": ["document"],
        "summary": "This document",
        "description": "An extension.",
        "responses": {
            "200": answer("The document", {"type": "object", "required": ["openapi", "paths"]}),
            "400": response_ref("BadRequest"),
            "500": response_ref("Failed"),
            "503": response_ref("Full"),
        },
    }


# Components


def _schemas() -> dict[str, Schema]:
    sent = sent_schemas(command.body for command in COMMANDS if command.body is not None)
    kinds = (
        *(VmConfig, *_TOLD[1:]),
        *(PciDeviceInfo, PciBarResource, AddressRange),
    )
    told = told_schemas(kinds, sent=sent)
    return sent | told | _handwritten() | error_schemas()


def _handwritten() -> dict[str, Schema]:
    """Return what msgspec cannot describe: maps, and values of several kinds without a tag."""
    resource = [ref("PciBarResource"), ref("AddressRange"), {"type": "integer"}, {"type": "string"}]
    return {
        "VmState": {"enum": ["Created", "Running", "Shutdown", "Paused", "BreakPoint"]},
        "VmInfo": object_schema(
            "The VM as it is now",
            {
                "config": ref("VmConfigTold"),
                "state": ref("VmState"),
                "memory_actual_size": {"type": "integer", "minimum": 0, "description": "Bytes"},
                "device_tree": {
                    "type": "object",
                    "additionalProperties": ref("DeviceNode"),
                    "description": "While a VM object exists",
                },
            },
            optional=("device_tree",),
        ),
        "DeviceNode": object_schema(
            "A device and what it occupies",
            {
                "id": {"type": "string"},
                "resources": {
                    "type": "array",
                    "items": {"type": "object", "additionalProperties": {"anyOf": resource}},
                },
                "parent": {"type": "string"},
                "children": {"type": "array", "items": {"type": "string"}},
                "pci_bdf": {"type": "string"},
            },
            optional=("parent", "pci_bdf"),
        ),
        "VmCounters": {
            "description": "By device, then by the counter's name",
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": {"type": "integer", "minimum": 0},
            },
        },
    }
