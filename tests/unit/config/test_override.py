"""A saved configuration is changed as its overrides say, and nothing else of it."""

from __future__ import annotations

import copy

import pytest

from cloudvmm.config.override import OverrideError, override

SAVED = {
    "cpus": {"boot_vcpus": 1},
    "payload": {"kernel": "/k", "cmdline": "quiet"},
    "disks": [
        {"id": "a", "path": "/a", "rate_limiter_config": {"bandwidth": {"size": 1}, "ops": {"size": 2}}},
        {"id": "b", "path": "/b"},
    ],
    "serial": {"mode": "File", "file": "/log"},
}


@pytest.mark.parametrize(
    ("overrides", "place", "value"),
    [
        ({"disks": [{"id": "b", "path": "/c"}]}, ("disks", 1), {"id": "b", "path": "/c"}),
        ({"disks": [{"id": "a", "rate_limiter_config": None}]}, ("disks", 0), {"id": "a", "path": "/a"}),
        (
            {"disks": [{"id": "a", "rate_limiter_config": {"ops": None}}]},
            ("disks", 0, "rate_limiter_config"),
            {"bandwidth": {"size": 1}},
        ),
        ({"payload": {"kernel": "/n"}}, ("payload",), {"kernel": "/n", "cmdline": "quiet"}),
        ({"serial": {"mode": "Null", "file": None}}, ("serial",), {"mode": "Null"}),
        ({"console": {"mode": "Off"}}, ("console",), {"mode": "Off"}),
    ],
)
def test_what_is_named_is_changed_and_nothing_else(overrides, place, value):
    wanted = copy.deepcopy(SAVED)
    *way, last = place
    parent = wanted
    for step in way:
        parent = parent[step]
    parent[last] = value
    before = copy.deepcopy(SAVED)

    assert override(SAVED, overrides) == wanted
    assert before == SAVED


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"cpus": {"boot_vcpus": 2}}, "'cpus' of a saved VM cannot be overridden"),
        ({"memory": {"size": 1}}, "'memory' of a saved VM"),
        ({"nonsense": 1}, "'nonsense' of a saved VM"),
        ({"serial": None}, "'serial' of a saved VM"),
        ({"disks": [{"id": "c", "path": "/c"}]}, "no device 'c' in 'disks'"),
        ({"net": [{"id": "n"}]}, "no device 'n' in 'net'"),
        ({"disks": [{"path": "/c"}]}, "a list of objects with the id of a device"),
        ({"disks": {"id": "a"}}, "a list of objects"),
        ({"disks": None}, "a list of objects"),
        ({"disks": [{"id": "a"}, {"id": "a"}]}, "a list of objects"),
        ({"disks": ["a"]}, "a list of objects"),
    ],
)
def test_what_cannot_be_is_refused(overrides, words):
    with pytest.raises(OverrideError, match=words):
        override(SAVED, overrides)
