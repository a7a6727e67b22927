"""Every member of every request's body, at any depth, and values of the wrong type for it."""

from __future__ import annotations

import pytest
from msgspec import inspect as kinds

from cloudvmm.api import COMMANDS
from support.config_value import NEEDED

SAMPLES = {"null": None, "bool": True, "int": -1, "float": 1.5, "str": "\u0000?", "array": [[]], "object": {}}
JSON_KINDS = {
    kinds.AnyType: set(SAMPLES),
    kinds.NoneType: {"null"},
    kinds.BoolType: {"bool"},
    kinds.IntType: {"int"},
    kinds.FloatType: {"float", "int"},
    kinds.StrType: {"str"},
    kinds.EnumType: {"str"},
    kinds.LiteralType: {"str"},
    kinds.ListType: {"array"},
    kinds.VarTupleType: {"array"},
    kinds.TupleType: {"array"},
    kinds.DictType: {"object"},
    kinds.StructType: {"object"},
}


def accepted(kind) -> set[str]:
    """Return the kinds of JSON value that a member of type `kind` may have."""
    if isinstance(kind, kinds.Metadata):
        return accepted(kind.type)
    if isinstance(kind, kinds.UnionType):
        return set().union(*map(accepted, kind.types))
    return JSON_KINDS[type(kind)]


def minimal(kind):
    """Return the smallest value of type `kind`, as JSON."""
    if isinstance(kind, kinds.Metadata):
        return minimal(kind.type)
    if isinstance(kind, kinds.UnionType):
        return minimal(next(one for one in kind.types if not isinstance(one, kinds.NoneType)))
    if isinstance(kind, kinds.StructType):
        needed = NEEDED.get(kind.cls, ())
        return {
            field.encode_name: minimal(field.type)
            for field in kind.fields
            if field.required or field.name in needed
        }
    if isinstance(kind, kinds.EnumType):
        return next(iter(kind.cls)).value
    return {"bool": False, "int": 1, "str": "x", "array": [], "object": {}}[next(iter(accepted(kind)))]


def inner_structs(kind):
    """Yield each struct that a value of type `kind` can hold directly, and how to wrap a value of it."""
    if isinstance(kind, kinds.Metadata):
        yield from inner_structs(kind.type)
    elif isinstance(kind, kinds.UnionType):
        for one in kind.types:
            yield from inner_structs(one)
    elif isinstance(kind, kinds.ListType):
        for struct, wrap in inner_structs(kind.item_type):
            yield struct, lambda value, wrap=wrap: [wrap(value)]
    elif isinstance(kind, kinds.StructType):
        yield kind, lambda value: value


def members(struct, path, wrap):
    """Yield (path, type, function from a value to the whole body) for every member, at any depth."""
    for field in struct.fields:

        def whole(value, name=field.encode_name):
            return wrap({**minimal(struct), name: value})

        here = f"{path}.{field.encode_name}"
        yield here, field.type, whole
        for inner, inner_wrap in inner_structs(field.type):

            def around(value, whole=whole, inner_wrap=inner_wrap):
                return whole(inner_wrap(value))

            yield from members(inner, here, around)


def all_members():
    for command in COMMANDS:
        if command.body is not None:
            for path, kind, whole in members(
                kinds.type_info(command.body), command.name, lambda value: value
            ):
                yield pytest.param(command.name, kind, whole, id=path)
