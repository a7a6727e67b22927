"""A request that comes when there is no descriptor left to load what answers it with."""

from __future__ import annotations

import errno
import os
import sys

import msgspec
import pytest

from cloudvmm.api.channel import api_channel
from cloudvmm.host.eventfd import EventFd
from cloudvmm.http import prompt
from cloudvmm.http.error import InternalServerError
from cloudvmm.http.exchange import Exchange
from cloudvmm.http.service import VmmService
from cloudvmm.wire.http import Request

SHORT = OSError(errno.EMFILE, os.strerror(errno.EMFILE), "route.py")


class NoImport:
    """Finds nothing of the routes, for `reason`."""

    def __init__(self, reason: Exception) -> None:
        self._reason = reason

    def find_spec(self, name: str, *_: object) -> None:
        if name == "cloudvmm.http.route":
            raise self._reason


@pytest.mark.parametrize(
    ("reason", "text"),
    [(SHORT, "Too many open files"), (ImportError("libx.so: Too many open files"), "ImportError")],
)
def test_request_that_cannot_be_answered_yet_is_told_so_and_the_next_one_is_answered(
    monkeypatch: pytest.MonkeyPatch, reason: Exception, text: str
) -> None:
    sender, _ = api_channel()
    event = EventFd()
    service = VmmService(event, sender)
    said: list[str] = []
    exchange = Exchange(service, lambda level, words: said.append(f"{level}: {words}"))
    request = Request("GET", "/api/v1/nothing", b"")
    monkeypatch.delitem(sys.modules, "cloudvmm.http.route", raising=False)
    monkeypatch.delattr("cloudvmm.http.route", raising=False)
    with monkeypatch.context() as short:
        short.setattr(sys, "meta_path", [NoImport(reason), *sys.meta_path])
        head, body = prompt.answer(request, [], exchange).split(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 500 \r\n")
    assert f"X-Cloudvmm-Error: {InternalServerError.__name__}".encode() in head
    assert msgspec.json.decode(body) == [str(InternalServerError()), text]
    assert len(said) == 1
    assert prompt.answer(request, [], exchange).startswith(b"HTTP/1.1 404 ")
    service.close()
    event.close()
