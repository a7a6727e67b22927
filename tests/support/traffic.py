"""Holding what goes over a connection against the API's document.

A request that was carried out has a body that the document allows; every answer has a status, a content type
and a body that the document gives for its path. What answers bytes that are no request is looked for among
all answers.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloudvmm.wire.http import Refusal, Request, RequestParser
from cloudvmm.wire.response import ERROR_HEADER
from support.any_json import load_json

PREFIX = "/api/v1"
URL = "http://localhost"
JSON = "application/json"
CACHE_SIZE = 4096


class Answer:
    """One response: `content_type` and `code` are None where the header is not there."""

    def __init__(self, status: int, content_type: str | None, code: str | None, body: bytes) -> None:
        self.status = status
        self.content_type = content_type
        self.code = code
        self.body = body

    @classmethod
    def of(cls, head: bytes, body: bytes) -> Answer:
        """Read it from the bytes up to the empty line, and those behind it."""
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
        }
        return cls(
            int(status_line.split()[1]),
            headers.get("content-type"),
            headers.get(ERROR_HEADER.lower()),
            body,
        )

    def __str__(self) -> str:
        return f"{self.status} {self.content_type} {self.code} {self.body[:300]!r}"


class Traffic:
    """Follows one connection, request by answer."""

    def __init__(self) -> None:
        self._parser = RequestParser()
        self._waiting: deque[Request] = deque()
        self._is_lost = False

    def sent(self, raw: bytes) -> None:
        if self._is_lost:
            return
        for event in self._parser.feed(raw):
            if isinstance(event, Request):
                self._waiting.append(event)
            # What a refusal takes with it depends on how the stream was cut up on the way.
            self._is_lost |= isinstance(event, Refusal)

    def answered(self, head: bytes, body: bytes) -> None:
        """:raises AssertionError: the exchange is outside the document."""
        answer = Answer.of(head, body)
        if answer.status == 100:
            return
        self._is_lost |= answer.status == 503
        if self._is_lost or not self._waiting:
            check_answer_alone(answer)
            return
        request = self._waiting.popleft()
        check_exchange(request.method, request.path, request.body, answer)


def check_exchange(method: str, path: str, request_body: bytes | None, answer: Answer) -> None:
    """:raises AssertionError: the document does not allow this answer to this request."""
    key = (answer.status, answer.content_type, answer.code, answer.body)
    if fault := _fault_of_exchange(method, path, request_body, *key):
        raise AssertionError(f"{method} {path} {(request_body or b'')[:300]!r} -> {answer}: {fault}")


def check_curl(words: Sequence[str], answer: Answer) -> None:
    """Check the one call that curl was asked for with `words`.

    :raises AssertionError: the document does not allow this answer to this call.
    """
    options = dict(itertools.pairwise(words))
    data = options.get("-d") or options.get("--data-binary")
    body = Path(data[1:]).read_bytes() if data and data.startswith("@") else data and data.encode()
    (url,) = (word for word in words if word.startswith(URL))
    check_exchange(options.get("-X", "POST" if data else "GET"), url.removeprefix(URL), body or None, answer)


def check_answer_alone(answer: Answer) -> None:
    """:raises AssertionError: the document gives no such answer for any path."""
    faults = []
    for status, described in _all_answers():
        if status != answer.status:
            continue
        fault = _fault_of_answer(described, answer)
        if fault is None:
            return
        faults.append(fault)
    raise AssertionError(f"{answer}: not an answer of any path: {faults}")


@functools.lru_cache(CACHE_SIZE)
def _fault_of_exchange(
    method: str,
    path: str,
    request_body: bytes | None,
    status: int,
    content_type: str | None,
    code: str | None,
    body: bytes,
) -> str | None:
    answer = Answer(status, content_type, code, body)
    operations = _operations(path.removeprefix(PREFIX)) if path.startswith(PREFIX) else None
    if operations is None:
        return _fault_of_kind("NoSuchPath", 404, answer)
    operation = operations.get(method.lower())
    if operation is None:
        return _fault_of_kind("WrongMethod", 400, answer)
    described = operation["responses"].get(str(status))
    if described is None:
        return f"the document has {', '.join(operation['responses'])} alone"
    return _fault_of_answer(_resolved(described), answer) or _fault_of_request(
        operation, request_body, status
    )


def _operations(path: str) -> dict[str, Any] | None:
    """Return what the document has for `path`; a query counts as such only where it has one."""
    name, has_query, _ = path.partition("?")
    operations: dict[str, Any] | None = _document()["paths"].get(name)
    if has_query and not any(one.get("parameters") for one in (operations or {}).values()):
        return None
    return operations


def _fault_of_kind(name: str, status: int, answer: Answer) -> str | None:
    if answer.status != status:
        return f"not {status}, which {name} is"
    return _fault_of_answer(_document()["components"]["responses"][name], answer)


def _fault_of_answer(described: dict[str, Any], answer: Answer) -> str | None:
    content = described.get("content", {})
    has_code = ERROR_HEADER in described.get("headers", {})
    if has_code != (answer.code is not None) or (answer.code is not None and not _is_code(answer.code)):
        return f"not a code that belongs here: {answer.code}"
    if any(re.search(form, answer.body.decode(errors="replace")) for form in described.get("x-bodies", ())):
        return None
    if not content:
        return None if answer.body == b"" else "there should be no body"
    wanted = content.get(answer.content_type) or (content.get("*/*") if answer.content_type is None else None)
    if wanted is None:
        return f"the content type should be {', '.join(content)}"
    return _fault_of_json(wanted["schema"], answer.body)


def _fault_of_request(operation: dict[str, Any], body: bytes | None, status: int) -> str | None:
    described = operation.get("requestBody")
    if status >= 300 or described is None:
        return None
    if body is None:
        return "it was carried out without a body"
    fault = _fault_of_json(described["content"][JSON]["schema"], body)
    return f"it was carried out with a body that the document forbids: {fault}" if fault else None


def _fault_of_json(schema: dict[str, Any], body: bytes) -> str | None:
    try:
        value = load_json(body)
    except ValueError as error:
        return f"not JSON: {error}"
    error = next(_validator(json.dumps(schema)).iter_errors(value), None)
    return f"{error.message} at {error.instance_path}" if error else None


def _is_code(text: str) -> bool:
    schema = _document()["components"]["headers"][ERROR_HEADER]["schema"]
    return re.search(schema["pattern"], text) is not None


def _resolved(described: dict[str, Any]) -> dict[str, Any]:
    name = described.get("$ref", "").removeprefix("#/components/responses/")
    return _document()["components"]["responses"][name] if name else described


@functools.cache
def _document() -> dict[str, Any]:
    # Imported where it is needed first: many tests that load this have no traffic.
    from cloudvmm.http.openapi import document

    return document()


@functools.cache
def _all_answers() -> tuple[tuple[int, dict[str, Any]], ...]:
    responses = [
        (int(status), _resolved(described))
        for operations in _document()["paths"].values()
        for operation in operations.values()
        for status, described in operation["responses"].items()
    ]
    kinds = _document()["components"]["responses"]
    return (*responses, (404, kinds["NoSuchPath"]), (400, kinds["WrongMethod"]))


@functools.cache
def _validator(schema: str) -> Any:
    whole = json.loads(schema) | {"components": _document()["components"]}
    import jsonschema_rs

    return jsonschema_rs.Draft202012Validator(whole)
