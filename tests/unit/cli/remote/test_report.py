"""What a failure looks like on standard error."""

import re

import pytest

from cloudvmm.cli.remote.error import (
    ConfigSyntax,
    HttpApiClient,
    InvalidCpuCount,
    NotOnDBus,
    Reason,
    ServerResponse,
)
from cloudvmm.cli.remote.log import level_of, log_error
from cloudvmm.cli.remote.report import report
from cloudvmm.options.error import ParseError, UnknownOption

HEAD = "Error: ch-remote exited with the following chain of errors:\n"


def reported(error, cause, capsys, monkeypatch):
    monkeypatch.setenv("RUST_LOG", "off")
    error.__cause__ = cause
    report(error)
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_servers_chain_continues_the_numbers(capsys, monkeypatch):
    body = '["Error from API","The VM info is not available","VM is not created"]'
    assert reported(HttpApiClient(), ServerResponse(404, body), capsys, monkeypatch) == (
        f"{HEAD}  0: http client error\n  1: Server responded with NotFound\n  2: Error from API\n"
        "  3: The VM info is not available\n  4: VM is not created\n"
    )


def test_option_string_at_fault_is_followed_by_what_is_allowed(capsys, monkeypatch):
    cause = ParseError("--tpm", hint="socket=<path>")
    cause.__cause__ = UnknownOption("path")
    assert reported(ConfigSyntax("tpm"), cause, capsys, monkeypatch) == (
        f"{HEAD}  0: Error parsing tpm syntax\n  1: Error parsing --tpm\n  2: Unknown option: path\n"
        "\nAllowed: socket=<path>\n"
    )


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (400, "BadRequest"),
        (404, "NotFound"),
        (409, "Unknown"),
        (429, "TooManyRequests"),
        (500, "InternalServerError"),
        (501, "NotImplemented"),
        (503, "Unknown"),
        (201, "Unknown"),
    ],
)
def test_status_has_the_references_name(status, name, capsys, monkeypatch):
    text = reported(HttpApiClient(), ServerResponse(status, "[]"), capsys, monkeypatch)
    assert text == f"{HEAD}  0: http client error\n  1: Server responded with {name}\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "EOF while parsing a value at line 1 column 0"),
        ('{"error":"x"}', "invalid type: map, expected a sequence at line 1 column 13"),
        ("[1]", "invalid type: integer, expected a string at `$[0]`"),
    ],
)
def test_body_that_is_no_list_of_texts_is_shown(body, reason, capsys, monkeypatch):
    text = reported(HttpApiClient(), ServerResponse(400, body), capsys, monkeypatch)
    assert text == (
        f"{HEAD}  0: http client error\n"
        f"  X: Can't get remote's error messages from JSON response: {reason}: body='{body}'\n"
    )


def test_single_error_has_no_number(capsys, monkeypatch):
    text = reported(NotOnDBus("nmi"), None, capsys, monkeypatch)
    assert text == (
        "Error: ch-remote exited with the following error:\n"
        "  nmi is not available over D-Bus; use --api-socket\n"
    )


def test_own_chain_is_numbered(capsys, monkeypatch):
    cause = Reason("invalid digit found in string")
    text = reported(InvalidCpuCount("x"), cause, capsys, monkeypatch)
    assert text == (
        f"{HEAD}  0: Error parsing CPU count\n  1: invalid digit found in string\n"
        "\nAllowed: --cpus <number>; given: x\n"
    )


def test_log_line_comes_first(capsys, monkeypatch):
    monkeypatch.delenv("RUST_LOG", raising=False)
    error = HttpApiClient()
    error.__cause__ = ServerResponse(409, '["a \\"b\\""]')
    report(error)
    line, head, *_ = capsys.readouterr().err.splitlines(keepends=True)
    assert head == HEAD
    assert re.sub(r"\[\S+Z ", "[TIME ", line) == (
        "[TIME ERROR cloud_hypervisor] Fatal error: "
        r'HttpApiClient(ServerResponse(Unknown, Some("[\"a \\\"b\\\"\"]")))'
        "\n"
    )


def test_log_line_form(capsys, monkeypatch):
    monkeypatch.delenv("RUST_LOG", raising=False)
    log_error("Error opening HTTP socket: x")
    assert re.fullmatch(
        r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ERROR ch_remote\] Error opening HTTP socket: x\n",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    ("directives", "is_shown"),
    [
        ("", True),
        ("off", False),
        ("OFF", False),
        ("error", True),
        ("debug", True),
        ("ch_remote=off", False),
        ("cloud_hypervisor=warn", False),
        ("off,ch_remote", True),
        ("trace,ch_remote=off", False),
        ("ch=off,error", False),
        ("ch_remote=off,ch=error", False),
        ("error/regex", True),
        ("a=b=c", True),
    ],
)
def test_rust_log_chooses(directives, is_shown):
    assert (level_of("ch_remote", directives) > 0) is is_shown
