"""Commands held against a schema like QEMU's."""

from __future__ import annotations

import pytest

from support.qmp_schema import QmpSchema

SCHEMA = QmpSchema(
    [
        {"name": "cont", "meta-type": "command", "arg-type": "0", "ret-type": "0"},
        {"name": "0", "meta-type": "object", "members": []},
        {"name": "dump", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
        {
            "name": "1",
            "meta-type": "object",
            "members": [
                {"name": "paging", "type": "bool"},
                {"name": "format", "type": "2", "default": None},
                {"name": "bounds", "type": "[int]", "default": None},
                {"name": "either", "type": "3", "default": None},
            ],
        },
        {"name": "2", "meta-type": "enum", "members": [{"name": "elf"}], "values": ["elf"]},
        {"name": "[int]", "meta-type": "array", "element-type": "int"},
        {"name": "3", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "int"}]},
        {"name": "int", "meta-type": "builtin", "json-type": "int"},
        {"name": "str", "meta-type": "builtin", "json-type": "string"},
        {"name": "bool", "meta-type": "builtin", "json-type": "boolean"},
        {"name": "add", "meta-type": "command", "arg-type": "4", "ret-type": "0"},
        {
            "name": "4",
            "meta-type": "object",
            "members": [{"name": "driver", "type": "str"}],
            "tag": "driver",
            "variants": [{"case": "raw", "type": "5"}],
        },
        {"name": "5", "meta-type": "object", "members": [{"name": "file", "type": "str"}]},
    ]
)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("cont", {}),
        ("dump", {"paging": False, "format": "elf", "bounds": [1, 2], "either": "x"}),
        ("dump", {"paging": True, "either": 5}),
        ("add", {"driver": "raw", "file": "x"}),
        ("add", {"driver": "null"}),
    ],
)
def test_right_calls(command, arguments):
    assert SCHEMA.complaints(command, arguments) == []


@pytest.mark.parametrize(
    ("command", "arguments", "complaint"),
    [
        ("continue", {}, "continue: no such command"),
        ("0", {}, "0: no such command"),
        ("cont", {"now": True}, "cont.now: no such member"),
        ("dump", {}, "dump.paging: missing"),
        ("dump", {"paging": 1}, "dump.paging: not of type boolean"),
        ("dump", {"paging": True, "format": "zip"}, "dump.format: 'zip' is not one of its values"),
        ("dump", {"paging": True, "bounds": [1, "2"]}, "dump.bounds[1]: not of type int"),
        ("dump", {"paging": True, "bounds": 1}, "dump.bounds: not an array"),
        ("dump", {"paging": True, "either": []}, "dump.either: no alternative fits"),
        ("add", {"driver": "raw"}, "add.file: missing"),
        ("add", {"driver": "null", "file": "x"}, "add.file: no such member"),
    ],
)
def test_wrong_calls_are_named_with_their_place(command, arguments, complaint):
    assert SCHEMA.complaints(command, arguments) == [complaint]
