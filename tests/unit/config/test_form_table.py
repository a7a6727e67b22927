"""Of every member of every struct: whether null will do, whether it may be missing, whether it is printed."""

import enum
import json
import types
from typing import Annotated, Union, get_args, get_origin

import msgspec
import pytest

from cloudvmm.config import operation
from cloudvmm.config.error import DecodeError
from cloudvmm.config.form import decode, encode
from cloudvmm.config.rate_limit import RateLimiterConfig, TokenBucketConfig
from cloudvmm.config.vm import VmConfig
from support.config_value import NEEDED


def structs_in(annotation):
    """Give every struct that `annotation` is or holds."""
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        yield annotation
        for field in msgspec.structs.fields(annotation):
            yield from structs_in(field.type)
    for argument in get_args(annotation):
        yield from structs_in(argument)


OPERATIONS = [
    operation.RestoreConfig,
    operation.VmCoredumpData,
    operation.VmReceiveMigrationData,
    operation.VmRemoveDeviceData,
    operation.VmResizeData,
    operation.VmResizeDiskData,
    operation.VmResizeZoneData,
    operation.VmSendMigrationData,
    operation.VmSnapshotConfig,
]
STRUCTS = sorted(
    {struct for kind in (VmConfig, *OPERATIONS) for struct in structs_in(kind)},
    key=lambda kind: kind.__name__,
)
MEMBERS = [(kind, field) for kind in STRUCTS for field in msgspec.structs.fields(kind)]
PRINTED_AS_NULL = (
    RateLimiterConfig,
    TokenBucketConfig,
    operation.RestoreConfig,
    operation.RestoredNetConfig,
    operation.RestoredVfioConfig,
    operation.VmReceiveMigrationData,
    operation.VmResizeData,
    operation.VmSendMigrationData,
)


def is_optional(annotation):
    return type(None) in get_args(annotation)


def sample(annotation):
    """Give some JSON value of `annotation`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return max(1, get_args(annotation)[1].ge)
    if origin in (Union, types.UnionType):
        return sample(get_args(annotation)[0])
    if origin is list:
        return [sample(get_args(annotation)[0])]
    if issubclass(annotation, enum.Enum):
        return next(iter(annotation)).value
    if issubclass(annotation, msgspec.Struct):
        return required(annotation)
    return {str: "text", bool: True}[annotation]


def is_needed(kind, field):
    return field.required or field.name in NEEDED.get(kind, ())


def required(kind):
    return {
        field.name: sample(field.type) for field in msgspec.structs.fields(kind) if is_needed(kind, field)
    }


def ids(value):
    return value.__name__ if isinstance(value, type) else value.name


def text_of(kind, **members):
    return json.dumps({**required(kind), **members}).encode()


@pytest.mark.parametrize(("kind", "field"), MEMBERS, ids=ids)
def test_null_will_do_for_an_optional_member_only(kind, field):
    text = text_of(kind, **{field.name: None})
    if is_needed(kind, field) and not field.required:
        with pytest.raises(DecodeError, match=f"missing field `{field.name}`"):
            decode(text, kind)
    elif is_optional(field.type):
        assert getattr(decode(text, kind), field.name) is None
    else:
        with pytest.raises(DecodeError, match="invalid type: null"):
            decode(text, kind)


@pytest.mark.parametrize(("kind", "field"), MEMBERS, ids=ids)
def test_required_member_cannot_be_left_out(kind, field):
    members = required(kind)
    members.pop(field.name, None)
    text = json.dumps(members).encode()
    if is_needed(kind, field):
        with pytest.raises(DecodeError, match=f"missing field `{field.name}`"):
            decode(text, kind)
    else:
        assert decode(text, kind) == decode(text_of(kind), kind)


@pytest.mark.parametrize(("kind", "field"), MEMBERS, ids=ids)
def test_member_of_another_type_is_refused(kind, field):
    with pytest.raises(DecodeError, match="invalid type"):
        decode(text_of(kind, **{field.name: 1.5}), kind)


@pytest.mark.parametrize("kind", STRUCTS, ids=ids)
def test_unknown_member_is_ignored_except_in_a_rate_limiter(kind):
    text = text_of(kind, from_the_future={"a": [1]})
    if kind is RateLimiterConfig:
        with pytest.raises(DecodeError, match="unknown field `from_the_future`"):
            decode(text, kind)
    else:
        assert decode(text, kind) == decode(text_of(kind), kind)


@pytest.mark.parametrize("kind", STRUCTS, ids=ids)
def test_unset_member_is_left_out_or_null_as_in_the_reference(kind):
    printed = json.loads(encode(decode(text_of(kind), kind)))
    unset = {
        field.name
        for field in msgspec.structs.fields(kind)
        if is_optional(field.type) and not is_needed(kind, field)
    }
    if issubclass(kind, PRINTED_AS_NULL):
        assert {name for name, value in printed.items() if value is None} == unset
    else:
        assert unset.isdisjoint(printed)
        of_special_builds = {"gdb", "tdx", "sev_snp"}
        hidden = {"iommu"} - ({"iommu"} if kind is VmConfig else set()) | of_special_builds
        names = {
            field.name
            for field in msgspec.structs.fields(kind)
            if msgspec.UnsetType not in get_args(field.type)
        }
        assert set(printed) == names - unset - hidden
