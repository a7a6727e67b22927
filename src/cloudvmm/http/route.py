"""From a request to the bytes of its answer. The routes are `cloudvmm.api.COMMANDS`, or those of a daemon.

A command that reads is a GET, one that changes is a PUT. How the two are misused, and what is then said,
differs between four early endpoints and all others; the differences are the reference's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cloudvmm.api import (
    COMMANDS,
    ApiError,
    ApiRequest,
    ApiResponsePayload,
    Effect,
    Empty,
    VmActionPayload,
    VmInfo,
)
from cloudvmm.config import form
from cloudvmm.config.error import DecodeError
from cloudvmm.errors import error_chain, error_code
from cloudvmm.http.descriptor import place_descriptors, takes_at_most
from cloudvmm.http.error import (
    BodyMissing,
    BodyNotTaken,
    DeserializeFailed,
    HttpError,
    InternalServerError,
    NotFound,
    WrongDescriptorCount,
    WrongMethod,
)
from cloudvmm.http.path import ROOT
from cloudvmm.http.status import api_failure, error_response
from cloudvmm.wire.http import Request
from cloudvmm.wire.response import response

if TYPE_CHECKING:
    from cloudvmm.http.exchange import Exchange, Log

DOCUMENT_PATH: Final = ROOT + "openapi.json"

_DONE: Final = response(204)
_DONE_WITH_200: Final = response(200)
_EMPTY_400_OF_METHOD: Final = response(400, code=error_code(WrongMethod()))
_EMPTY_400_OF_BODY: Final = response(400, code=error_code(BodyMissing()))

# These refuse every other method in words; the others refuse PATCH and DELETE without any.
_WORDY: Final = frozenset(("vm.create", "vm.info", "vmm.ping", "vmm.shutdown"))

_encode_json = msgspec.json.Encoder().encode


class Route:
    """What one path takes and how its success is told."""

    __slots__ = ("command", "done", "ignores_body", "is_wordy", "method", "without_body")

    def __init__(self, command: type[ApiRequest]) -> None:
        self.command = command
        self.method = "GET" if command.effect is Effect.READS else "PUT"
        self.is_wordy = command.name in _WORDY
        self.ignores_body = self.method == "GET" or command.name == "vmm.shutdown"
        self.done = _DONE_WITH_200 if command.name == "vmm.shutdown" else _DONE
        # What a missing body is answered with: words where this is None.
        self.without_body = _EMPTY_400_OF_BODY if command.name == "vm.create" else None


def routes_of(commands: Iterable[type[ApiRequest]]) -> dict[str, Route]:
    """Return the routes of `commands` by their paths."""
    return {ROOT + command.name: Route(command) for command in commands}


ROUTES: Final = routes_of(COMMANDS)


def answer(request: Request, fds: list[int], exchange: Exchange) -> bytes:
    """Carry out `request` and return the response, whatever happens.

    Blocks until the VMM thread has answered. Descriptors that the command takes are removed from
    `fds`; the others stay the caller's.
    """
    try:
        return _answer(request, fds, exchange)
    except ApiError as error:
        return refuse_command(error, exchange.log)
    except HttpError as error:
        return refuse(error, exchange.log)
    except Exception as fault:
        # A mistake of ours: this request's loss, not the server's.
        exchange.log("error", f"The HTTP server failed inside: {fault!r}")
        return refuse(InternalServerError(), exchange.log)


def refuse_command(error: ApiError, log: Log) -> bytes:
    """Return the response that a command is answered with that failed."""
    return refuse(api_failure(error), log, code=error_code(error))


def refuse(error: HttpError, log: Log, *, code: str = "") -> bytes:
    """Return the response that `error` is answered with, and log it in the reference's words."""
    log("info", f"HTTP API error response: {': '.join(error_chain(error))}")
    return error_response(error, code=code)


def _answer(request: Request, fds: list[int], exchange: Exchange) -> bytes:
    route = exchange.service.routes.get(request.path)
    if route is None:
        return _document(request, exchange)
    if request.method != route.method:
        return _wrong_method(route, request.method)
    if route.ignores_body:
        return _success(route, exchange, exchange.call(route.command, None, []))
    if route.command.body is None:
        if request.body is not None:
            raise BodyNotTaken
        return _success(route, exchange, exchange.call(route.command, None, []))
    if request.body is None:
        return _no_body(route)
    data = _decode(route.command.body, request.body, fds, exchange.log)
    taken = fds if place_descriptors(data, fds) else []
    return _success(route, exchange, exchange.call(route.command, data, taken))


def _document(request: Request, exchange: Exchange) -> bytes:
    if request.path != DOCUMENT_PATH:
        raise NotFound
    if request.method != "GET":
        raise WrongMethod
    return response(200, exchange.service.document())


def _wrong_method(route: Route, method: str) -> bytes:
    if route.is_wordy or method in ("GET", "PUT"):
        raise WrongMethod
    return _EMPTY_400_OF_METHOD


def _no_body(route: Route) -> bytes:
    if route.without_body is None:
        raise BodyMissing
    return route.without_body


def _decode(kind: type, body: bytes, fds: list[int], log: Log) -> Any:
    limit = takes_at_most(kind)
    if limit is not None and len(fds) > limit:
        raise WrongDescriptorCount
    try:
        return form.decode(body, kind, partial(log, "warn"))
    except DecodeError as error:
        raise DeserializeFailed from error


def _success(route: Route, exchange: Exchange, payload: ApiResponsePayload) -> bytes:
    if isinstance(payload, VmActionPayload):
        return route.done if payload.body is None else response(200, payload.body)
    if isinstance(payload, Empty):
        return route.done
    # The VMM thread gives the same object for as long as it says the same.
    if payload is not exchange.last_payload:
        body = form.encode(payload) if isinstance(payload, VmInfo) else _encode_json(payload)
        exchange.last_payload, exchange.last_response = payload, response(200, body)
    return exchange.last_response
