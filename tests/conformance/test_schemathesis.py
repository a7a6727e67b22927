"""schemathesis against a live server: what the document promises holds for requests nobody thought of.

Each operation is asked in each state of a VM, with bodies that the document allows and with ones it forbids.
The checks that Cloud Hypervisor's own answers break are listed in `EXCLUDED`, with the reason.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig

from cloudvmm.http.openapi import document
from cloudvmm.wire.response import ERROR_HEADER
from support.fuzzed import FuzzedServer, harmless, session

EXCLUDED = {
    "not_a_server_error": "what the state of the VM does not allow is a 500",
    "unsupported_method": "a wrong method is a 400, never a 405",
    "allow_header_conformance": "no answer has a header Allow, 405 being never sent",
    "positive_data_acceptance": "a body of the right form may break a rule, or need another state",
}
# Of answers without a body alone.
EXCLUDED_FOR_EMPTY = {
    "response_schema_conformance": "a 400 to PATCH, to DELETE, and to vm.create without a body has no body",
}
ROOT = Path(__file__).resolve().parents[2]
CODES = set(
    re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
)
STATES = ("nothing", "created", "booted")
ENDLESS = "/vm.events"
BASE_URL = "http://localhost/api/v1"
EXAMPLES = 15

SCHEMA = schemathesis.openapi.from_dict(
    document(),
    config=SchemathesisConfig.from_dict(
        {"generation": {"mode": "all", "deterministic": True, "max-examples": EXAMPLES}}
    ),
).exclude(path=ENDLESS)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    root = sorted(os.listdir("/"))
    server = FuzzedServer(tmp_path_factory.mktemp("fuzzed"))
    yield server
    assert server.close() == 0, server.said[-5000:]
    assert sorted(os.listdir("/")) == root


@pytest.fixture(scope="module")
def http(live):
    with session(live.path) as made:
        yield made


@pytest.mark.parametrize("state", STATES)
@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_operation_keeps_to_the_document(case, state, live, http):
    live.reach(state)
    case.body = answerable(harmless(case.body))
    response = case.call(base_url=BASE_URL, session=http)
    excluded = [*EXCLUDED, *(EXCLUDED_FOR_EMPTY if response.content == b"" else ())]
    case.validate_response(response, excluded_checks=CHECKS.get_by_names(excluded))
    assert is_decoded(case, response), f"The document allows what does not decode: {response.text}"
    assert is_answer_of_the_vmm(response), f"The server failed inside: {response.text}"


def answerable(body):
    """Return `body` without an address to listen at: who waits for a sender that never comes is silent."""
    if not isinstance(body, dict) or not isinstance(body.get("receiver_url"), str):
        return body
    return body | {"receiver_url": re.sub("^(unix|tcp):", "", body["receiver_url"])}


def is_decoded(case, response):
    """Return whether a body that the document allows was read as one.

    The document cannot tell how large a number may be where it leaves the form of a value open.
    """
    if not case.meta.generation.mode.is_positive or response.status_code != 400 or not response.content:
        return True
    title, *causes = response.json()
    allowed = [f"invalid value: integer `{number}`, expected u64" for number in beyond_u64(case.body)]
    return title != "Failed to deserialize JSON" or causes[-1] in allowed


def beyond_u64(value):
    """Yield the numbers in what JSON says that need more than 64 bits."""
    if isinstance(value, int) and value >= 1 << 64:
        yield value
    for member in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from beyond_u64(member)


def is_answer_of_the_vmm(response):
    """Return whether a 500 is one that a command gives, with a code that programs can know."""
    if response.status_code != 500:
        return True
    (code,) = response.headers[ERROR_HEADER.lower()]
    return response.json()[0] == "Error from API" and code in CODES


def test_vmm_that_was_told_to_end_is_started_again_by_the_next(live, http):
    live.reach("booted")
    starts = live.starts
    assert http.put(f"{BASE_URL}/vmm.shutdown").status_code == 200
    live.reach("nothing")
    assert live.starts == starts + 1
    assert http.get(f"{BASE_URL}/vmm.ping").status_code == 200


def test_checks_that_are_left_out_are_those_of_the_page():
    _, _, section = (
        (ROOT / "docs" / "openapi.md").read_text(encoding="utf-8").partition("## How it is held to")
    )
    rows = re.findall(r"^\| `(\w+)`(, of an empty body alone)? \| (.*) \|$", section, re.MULTILINE)
    assert {(check, reason) for check, _, reason in rows} == {*EXCLUDED.items(), *EXCLUDED_FOR_EMPTY.items()}
