"""Holding requests against the API's document: how the HTTP door answers when the VMM does all it is told.

No VMM runs: what a command does is not looked at, only what its request is taken for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cloudvmm.api import STREAMS, ApiRequest, ApiResponsePayload, Empty, VmActionPayload, VmForkResponse
from cloudvmm.http.exchange import Exchange
from cloudvmm.http.path import ROOT
from cloudvmm.http.route import DOCUMENT_PATH, ROUTES, answer
from cloudvmm.wire.http import Request

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the document's checks are

from support.traffic import Answer, check_answer_alone, check_exchange

# The document itself is the same for all, and a stream is not answered here.
_NOT_ASKED = {DOCUMENT_PATH, *(ROOT + stream.name for stream in STREAMS)}


# What a command that changes something answers with, where that is anything.
_ANSWERS: dict[type[ApiResponsePayload], ApiResponsePayload] = {
    VmActionPayload: VmActionPayload(None),
    VmForkResponse: VmForkResponse(clones=[], pause_ms=0.0, disks={}),
}


class _Routes:
    """A `Service` of a VMM's requests that is asked nothing."""

    is_vmm = True
    routes = ROUTES

    def ask(self, request: ApiRequest, fds: list[int]) -> None:
        raise AssertionError

    def document(self) -> bytes:
        raise AssertionError


class _Obedient(Exchange):
    """Says of each command that it was done."""

    def call(self, command: type[ApiRequest], data: Any, fds: list[int]) -> ApiResponsePayload:
        return _ANSWERS.get(command.answer, Empty())


def check_response(raw: bytes) -> None:
    """:raises AssertionError: the document gives no such answer for any path."""
    head, _, body = raw.partition(b"\r\n\r\n")
    check_answer_alone(Answer.of(head, body))


def check_answered(request: Request) -> None:
    """Have `request` answered, unless it reads: what is read would have to come from a VMM.

    :raises AssertionError: the document does not allow this answer to this request.
    """
    route = ROUTES.get(request.path)
    if request.path in _NOT_ASKED or (route is not None and route.method == request.method == "GET"):
        return
    raw = answer(request, [], _OBEDIENT)
    head, _, body = raw.partition(b"\r\n\r\n")
    check_exchange(request.method, request.path, request.body, Answer.of(head, body))


_OBEDIENT = _Obedient(_Routes())
