"""What help, completion and the reference are told about every key."""

import pytest

from cloudvmm.options.table import OPERATIONS, SCHEMAS, KeyDescription, describe
from cloudvmm.options.value import PATH

ALL = {**SCHEMAS, **OPERATIONS}


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_key_is_described_in_one_line(name):
    described = describe(ALL[name])
    assert described
    for key in described:
        assert key.help[0].isalpha()
        assert not key.help.endswith(".")
        assert "\n" not in key.help


@pytest.mark.parametrize("name", sorted(ALL))
def test_default_reads_back_as_what_is_left_out(name):
    schema = ALL[name]
    for key in schema.shown_keys:
        shown = next(each for each in describe(schema) if each.name == key.name)
        if shown.default is not None:
            assert key.kind.parse(shown.default) == schema.default_of(key)


def test_members_of_a_key_exist():
    limiter = {
        f"{bucket}_{part}" for bucket in ("bw", "ops") for part in ("size", "one_time_burst", "refill_time")
    }
    ignored = {"file", "forwards", "serial_number", "uuid", "virtio_id"}
    for schema in ALL.values():
        for key in schema.keys:
            assert key.member in {*schema.struct.__struct_fields__, *limiter, *ignored}


def test_description_tells_name_syntax_default_and_need():
    described = {key.name: key for key in describe(SCHEMAS["disk"])}
    assert described["queue_size"] == KeyDescription(
        "queue_size", "queue_size=<number>", "Size of each queue, a power of two", "128", False
    )
    assert described["sparse"].default == "on"
    assert described["path"].default is None
    assert "_disable_aio" not in described
    assert {key.name: key.is_required for key in describe(SCHEMAS["vsock"])}["cid"]
    assert describe(SCHEMAS["serial"])[0].name == "off"
    assert {key.name: key.default for key in describe(SCHEMAS["memory"])}["size"] == "512M"


def test_old_keys_are_not_shown():
    shown = {key.name for schema in ALL.values() for key in schema.shown_keys}
    assert shown.isdisjoint({"virtio_id", "serial_number", "uuid"})
    assert SCHEMAS["memory-zone"].keys[2].kind is PATH
