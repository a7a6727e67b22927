"""The parts of an OpenAPI document that the API of a VMM and that of a daemon share."""

from __future__ import annotations

from typing import Final

from cloudvmm import __version__
from cloudvmm.http.schema import REF, Schema
from cloudvmm.wire.response import ERROR_HEADER

EMPTY_BODY: Final = "^$"
REFUSAL_BODY: Final = r'^\{ "error": "[\s\S]*\nAll previous unanswered requests will be dropped\." \}$'

_JSON: Final = "application/json"


def responses() -> Schema:
    refused = (
        "Not HTTP, or not the method or the body that is asked for, or a configuration that breaks a rule. "
        "What the HTTP grammar refuses has a body that is not JSON"
    )
    return {
        "Continue": {"description": "An interim answer to `Expect: 100-continue`: the body may be sent"},
        "BadRequest": _error(refused, bodies=[REFUSAL_BODY]),
        "BadRequestOrNothing": _error(
            refused + "; without a request body the answer has none", bodies=[REFUSAL_BODY, EMPTY_BODY]
        ),
        "NotThere": _error("There is no VM, or no such device or job"),
        "Conflict": _error("An identifier or a device's path is there already"),
        "Pending": _error("The guest has not let go yet of the vCPUs that were to be removed"),
        "Failed": _error("The command failed; also what the state of the VM does not allow"),
        "Full": {
            "description": "Too many open connections; without a Content-Type, and the connection ends",
            "headers": _error_headers(),
            "content": {"*/*": {"schema": ref("TooManyConnections")}},
        },
        "FullOrTooManyStreams": {
            "description": "Too many open connections, as everywhere; or too many streams",
            "headers": _error_headers(),
            "content": {
                "*/*": {"schema": ref("TooManyConnections")},
                _JSON: {"schema": ref("ErrorChain")},
            },
        },
        "WrongMethod": _error(
            "The path has another method; no body for PATCH and DELETE", bodies=[REFUSAL_BODY, EMPTY_BODY]
        ),
        "NoSuchPath": _error("There is no such path"),
    }


def _error(description: str, *, bodies: list[str] | None = None) -> Schema:
    error = answer(description, ref("ErrorChain"))
    error["headers"] = _error_headers()
    if bodies is not None:
        error["x-bodies"] = bodies
    return error


def _error_headers() -> Schema:
    return {ERROR_HEADER: {"$ref": f"#/components/headers/{ERROR_HEADER}"}}


def heading(title: str, description: str) -> Schema:
    """Return how a document of ours begins."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": title,
            "version": __version__,
            "description": description,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://localhost/api/v1", "description": "A UNIX socket, not TCP"}],
    }


def headers() -> Schema:
    return {
        ERROR_HEADER: {
            "required": True,
            "description": "The stable code of the error: the innermost of the chain that has one",
            "schema": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9]*$"},
        }
    }


def object_schema(description: str, properties: Schema, *, optional: tuple[str, ...] = ()) -> Schema:
    required = [name for name in properties if name not in optional]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"description": description} | schema if description else schema


def answer(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {_JSON: {"schema": schema}}}


def ref(name: str) -> Schema:
    return {"$ref": REF + name}


def response_ref(name: str) -> Schema:
    return {"$ref": f"#/components/responses/{name}"}


def error_schemas() -> dict[str, Schema]:
    """Return the schemas of what an answer that is an error has for a body."""
    return {
        "ErrorChain": {
            "description": "Sentences, from the outermost error to its root cause",
            "type": "array",
            "items": {"type": "string"},
            "minItems": 1,
            "examples": [["Error from API", "The VM could not be paused", "VM is not running"]],
        },
        "TooManyConnections": object_schema("", {"error": {"const": "Too many open connections"}}),
    }
