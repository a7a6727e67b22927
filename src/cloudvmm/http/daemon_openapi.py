"""The document of a daemon's own API, made as `openapi.py` makes that of a VMM's.

Imported only where somebody asks for the document.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import msgspec

from cloudvmm import __version__
from cloudvmm.api import ApiRequest, Empty
from cloudvmm.api.data import DaemonPingResponse, HeldJobs, HeldVmm, HeldVmms
from cloudvmm.api.fleet import DAEMON_COMMANDS
from cloudvmm.http.component import answer, error_schemas, headers, heading, ref, response_ref, responses
from cloudvmm.http.openapi import python_name
from cloudvmm.http.path import ROOT
from cloudvmm.http.route import DOCUMENT_PATH, Route
from cloudvmm.http.schema import Schema, first_paragraph, sent_schemas, told_schemas

SAMPLES: Final[dict[str, dict[str, Any]]] = {
    "vmms.create": {"id": "web"},
    "vmms.delete": {"id": "web"},
    "vmms.cancel-job": {"vmm": "web", "id": 7},
}
# Statuses besides success, 400, 500 and 503, which every path can answer.
_NOT_THERE: Final = ("vmms.delete", "vmms.cancel-job")
_IN_CONFLICT: Final = ("vmms.create",)

_INFO: Final = f"""\
What `cloudvmm daemon` of cloudvmm {__version__} serves on its own UNIX socket. Every VMM that it holds has a
socket of its own, on which Cloud Hypervisor's REST API is served unchanged: `vmms.create` and `vmms.list`
tell where.

Any method but the one given here answers 400, and any other path 404. GET ignores a body; otherwise one may
not be sent where none is described. The status line has no reason phrase."""


def document() -> Schema:
    """Return the whole document as plain values."""
    paths: Schema = {
        f"/{command.name}": {Route(command).method.lower(): _operation(command)}
        for command in DAEMON_COMMANDS
    }
    paths["/" + DOCUMENT_PATH.removeprefix(ROOT)] = {"get": _own_operation()}
    return {
        **heading("cloudvmm daemon", _INFO),
        "paths": paths,
        "components": {"schemas": _schemas(), "responses": _responses(), "headers": headers()},
    }


@functools.cache
def document_json() -> bytes:
    """Return the document as it is served."""
    return msgspec.json.encode(document())


def _operation(command: type[ApiRequest]) -> Schema:
    summary, _, rest = first_paragraph(command.__doc__).partition(". ")
    operation: Schema = {
        "operationId": python_name(command.name),
        "summary": summary.rstrip("."),
        "description": rest or summary,
        "responses": _success(command) | _failures(command),
    }
    if command.body is not None:
        schema = {"schema": ref(command.body.__name__), "example": SAMPLES[command.name]}
        operation["requestBody"] = {"required": True, "content": {"application/json": schema}}
        operation["responses"] = {"100": response_ref("Continue")} | operation["responses"]
    return operation


def _success(command: type[ApiRequest]) -> Schema:
    if command.answer is Empty:
        return {"204": {"description": "Done"}}
    return {"200": answer("The answer", ref(command.answer.__name__))}


def _failures(command: type[ApiRequest]) -> Schema:
    # DELETE and PATCH are refused without a body.
    failures = {"400": response_ref("BadRequestOrNothing")}
    if command.name in _NOT_THERE:
        failures["404"] = response_ref("NotThere")
    if command.name in _IN_CONFLICT:
        failures["409"] = response_ref("Conflict")
    return failures | {"500": response_ref("Failed"), "503": response_ref("Full")}


def _own_operation() -> Schema:
    return {
        "operationId": "openapi_json",
        "summary": "This document",
        "description": "This document",
        "responses": {
            "200": answer("The document", {"type": "object", "required": ["openapi", "paths"]}),
            "400": response_ref("BadRequest"),
            "500": response_ref("Failed"),
            "503": response_ref("Full"),
        },
    }


def _responses() -> Schema:
    wanted = ("Continue", "BadRequest", "BadRequestOrNothing", "Failed", "Full", "NoSuchPath")
    found = {name: described for name, described in responses().items() if name in wanted}
    words = {"NotThere": "There is no such VMM or job", "Conflict": "There is a VMM of that name already"}
    for name, text in words.items():
        found[name] = responses()[name] | {"description": text}
    return found


def _schemas() -> dict[str, Schema]:
    sent = sent_schemas(command.body for command in DAEMON_COMMANDS if command.body is not None)
    told = told_schemas((DaemonPingResponse, HeldVmm, HeldVmms, HeldJobs), sent=sent)
    return sent | told | error_schemas()
