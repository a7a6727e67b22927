"""The list of error codes is the tree's, and each code means one error."""

from __future__ import annotations

import collections
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("list_errors", ROOT / "scripts" / "list_errors.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_tree_gives(script):
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")

    assert page == script.render(script.all_errors()), "out of date: run scripts/list_errors.py"


def test_codes_are_unique(script):
    names = collections.Counter(error.__name__ for error in script.all_errors())

    assert [name for name, count in names.items() if count > 1] == []


def test_codes_are_header_values_that_every_parser_takes(script):
    assert [
        one for one in script.all_errors() if not re.fullmatch(r"[A-Z][A-Za-z0-9]{2,60}", one.__name__)
    ] == []


@pytest.mark.parametrize(
    ("room", "name", "status"),
    [
        ("api", "VmNotCreated", 404),
        ("api", "VcpuRemovalPending", 429),
        ("api", "VmNotRunning", 500),
        ("config", "IdentifierNotUnique", 409),
        ("config", "MissingBootitem", 400),
        ("wire", "PayloadTooLarge", 400),
        ("http", "TooManyStreams", 503),
        ("cli", "ThreadExited", None),
    ],
)
def test_status_is_that_of_the_answer(script, room, name, status):
    (error,) = (one for one in script.all_errors() if one.__name__ == name)

    assert (error.__module__.split(".")[1], script.status_of(error)) == (room, status)


def test_text_has_its_arguments_in_braces(script):
    texts = {one.__name__: script.text_of(one) for one in script.all_errors()}

    assert texts["NoDeviceToRemove"] == 'No device with id "{device_id}" to remove'
    assert texts["WrongMethod"] == "Bad Request"
    assert texts["ParsingMaxConnections"] == "Error parsing --max-connections"
    assert texts["EngineTimeout"] == script.VARIES


def test_check_fails_on_a_page_that_lacks_an_error(script, tmp_path, monkeypatch):
    old_page = tmp_path / "errors.md"
    old_page.write_text(script.render(script.all_errors()[1:]), encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", old_page)

    assert script.main(["--check"]) == 1
