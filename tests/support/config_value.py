"""Hypothesis strategies for the structs of the configuration: every member, at every value it can have."""

from __future__ import annotations

import enum
import types
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
from hypothesis import strategies as st

from cloudvmm.config.device import FsConfig, TpmConfig

# Members without which a struct is none, though another may stand in for them.
NEEDED = {FsConfig: {"socket"}, TpmConfig: {"socket"}}

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)
SPECIAL = {
    "mac": st.just("2e:00:00:00:00:01"),
    "host_mac": st.just("2e:00:00:00:00:02"),
    "ip": st.sampled_from(["10.0.0.1", "2001:db8::1"]),
    "mask": st.just("255.255.255.0"),
    "fds": st.none(),
    "fd": st.none(),
    "iommufd_fd": st.sampled_from([None, -1]),
}


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Give values of an annotated type."""
    origin = get_origin(annotation)
    if origin is Annotated:
        meta = get_args(annotation)[1]
        return st.integers(meta.ge or 0, 2**64 - 1 if meta.le is None else meta.le)
    if origin in (Union, types.UnionType):
        return st.one_of([values(member) for member in get_args(annotation)])
    if origin is list:
        return st.lists(values(get_args(annotation)[0]), max_size=2)
    if origin is dict:
        return st.dictionaries(TEXT, TEXT, max_size=2)
    if annotation is msgspec.UnsetType:
        return st.just(msgspec.UNSET)
    if issubclass(annotation, enum.Enum):
        return st.sampled_from(annotation)
    if issubclass(annotation, msgspec.Struct):
        return structs(annotation)
    return {str: TEXT, bool: st.booleans(), int: st.integers(-1, 9), type(None): st.none()}[annotation]


def structs(kind: type[msgspec.Struct], **special: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Give structs of `kind`; members in `special` have values from there."""
    fields = msgspec.structs.fields(kind)
    known = {**SPECIAL, **special}
    members = {
        field.name: known[field.name] if field.name in known else values(field.type) for field in fields
    }
    members |= dict.fromkeys(NEEDED.get(kind, ()), TEXT)
    return st.builds(kind, **members)
