"""The check of traffic lets through what the document allows, and nothing else."""

from __future__ import annotations

import pytest

from support.rest import request_bytes
from support.traffic import Answer, Traffic, check_answer_alone, check_exchange

JSON = "application/json"
CHAIN = b'["Error from API","The VM could not be paused","VM is not running"]'


@pytest.mark.parametrize(
    ("method", "path", "body", "answer"),
    [
        ("PUT", "/api/v1/vm.pause", None, Answer(204, None, None, b"")),
        ("PUT", "/api/v1/vm.pause", None, Answer(500, JSON, "VmNotRunning", CHAIN)),
        ("PUT", "/api/v1/vmm.shutdown", b"x", Answer(200, JSON, None, b"")),
        ("PUT", "/api/v1/vm.create", None, Answer(400, JSON, "Code", b"")),
        ("PUT", "/api/v1/vm.create", b"{}", Answer(204, None, None, b"")),
        ("PUT", "/api/v1/vm.create", b'{"unknown":-' + b"7" * 5000 + b"}", Answer(204, None, None, b"")),
        ("DELETE", "/api/v1/vm.pause", None, Answer(400, JSON, "Code", b"")),
        ("GET", "/api/v1/nothing", None, Answer(404, JSON, "Code", b'["Not Found"]')),
        ("GET", "/api/v1/vm.info?x=1", None, Answer(404, JSON, "Code", b'["Not Found"]')),
        ("GET", "/api/v1/vm.events?from=x", None, Answer(400, JSON, "BadQuery", b'["Bad Request"]')),
        ("PUT", "/api/v1/vm.resize", b"{}", Answer(429, JSON, "Code", b'["Too Many Requests"]')),
    ],
)
def test_exchange_in_the_document_passes(method, path, body, answer):
    check_exchange(method, path, body, answer)


@pytest.mark.parametrize(
    ("method", "path", "body", "answer", "fault"),
    [
        ("PUT", "/api/v1/vm.pause", None, Answer(404, JSON, "Code", CHAIN), "has 204, 400, 500, 503 alone"),
        ("PUT", "/api/v1/vm.pause", None, Answer(204, None, None, b"x"), "should be no body"),
        ("PUT", "/api/v1/vm.pause", None, Answer(500, "text/plain", "Code", CHAIN), "content type should be"),
        ("PUT", "/api/v1/vm.pause", None, Answer(500, JSON, "Code", b"{}"), "is not of type"),
        ("PUT", "/api/v1/vm.pause", None, Answer(500, JSON, "Code", b""), "not JSON"),
        ("PUT", "/api/v1/vm.pause", None, Answer(500, JSON, "a code", CHAIN), "not a code"),
        ("PUT", "/api/v1/vm.pause", None, Answer(204, None, "VmNotRunning", b""), "not a code"),
        ("PUT", "/api/v1/vm.pause", None, Answer(500, JSON, None, CHAIN), "not a code"),
        ("PUT", "/api/v1/vm.create", b'{"cpus":1}', Answer(204, None, None, b""), "forbids"),
        (
            "PUT",
            "/api/v1/vm.create",
            b'{"cpus":' + b"7" * 5000 + b"}",
            Answer(204, None, None, b""),
            "forbids",
        ),
        ("PUT", "/api/v1/vm.create", None, Answer(204, None, None, b""), "without a body"),
        ("GET", "/api/v1/vm.pause", None, Answer(204, None, None, b""), "WrongMethod"),
        ("GET", "/api/v1/nothing", None, Answer(200, JSON, None, b"{}"), "NoSuchPath"),
    ],
)
def test_exchange_outside_the_document_is_told(method, path, body, answer, fault):
    with pytest.raises(AssertionError, match=fault):
        check_exchange(method, path, body, answer)


def test_answers_are_held_against_their_own_requests():
    traffic = Traffic()
    traffic.sent(request_bytes("PUT", "/api/v1/vm.pause") + request_bytes("GET", "/api/v1/vm.counters"))
    traffic.answered(b"HTTP/1.1 204 ", b"")
    with pytest.raises(AssertionError, match="vm.counters"):
        traffic.answered(b"HTTP/1.1 204 ", b"")


def test_answer_to_what_is_no_request_may_be_any_answer_but_must_be_one():
    traffic = Traffic()
    traffic.sent(b"POST / HTTP/1.1\r\n\r\n")
    traffic.answered(
        b"HTTP/1.1 404 \r\nX-Cloudvmm-Error: NotFound\r\nContent-Type: application/json", b'["Not Found"]'
    )
    with pytest.raises(AssertionError, match="not an answer of any path"):
        check_answer_alone(Answer(405, JSON, None, b"[]"))
