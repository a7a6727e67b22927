"""Whether a body gives a member twice: the decoder would take the last one, and the reference takes none.

As there, just members that are known count: what nobody knows is skipped, whatever it holds.
"""

from __future__ import annotations

import functools
import re
import types
from typing import Annotated, Any, Final, Union, get_args, get_origin

import msgspec

from cloudvmm.config.legacy import PLATFORM_ALIASES
from cloudvmm.config.platform import PlatformConfig

_BLANKS: Final = b" \t\r\n"
# A string, and the colon that makes it a member's name; or what opens and closes objects and lists.
_TOKEN: Final = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")(\s*:)?|[][{}]', re.DOTALL)
_NAMES: Final = {PlatformConfig: dict(PLATFORM_ALIASES)}

_decoder = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()


class _Open:
    """An object or a list that has begun; `inside` says what the next value in it is to be."""

    __slots__ = ("inside", "kind", "seen")

    def __init__(self, kind: Any, inside: Any) -> None:
        self.kind = kind
        self.inside = inside
        self.seen: set[str] = set()


def find_duplicate(raw: bytes, kind: type) -> tuple[str, int] | None:
    """Return the first known member that is given twice, and where its colon is; None where none is.

    `raw` is JSON that has been decoded as a `kind`.
    """
    return None if _is_surely_without(raw) else _search(raw, kind)


def _is_surely_without(raw: bytes) -> bool:
    """Cheap, which the search is not.

    A text that is written anew has each member once. So one that comes out as it was, but for blanks, had
    none twice; one that does not may just spell a number or a character in another way.
    """
    try:
        again = _encoder.encode(_decoder.decode(raw))
    except (msgspec.MsgspecError, OverflowError, RecursionError):
        return False  # a number that no float can hold, say, in a member that nobody knows
    return again.translate(None, _BLANKS) == raw.translate(None, _BLANKS)


def _search(raw: bytes, kind: type) -> tuple[str, int] | None:
    stack = [_Open(None, kind)]
    for token in _TOKEN.finditer(raw):
        here = stack[-1]
        match token[0][:1]:
            case b"{":
                stack.append(_Open(_struct_of(here.inside), None))
            case b"[":
                stack.append(_Open(None, _member_of(here.inside)))
            case b"}" | b"]":
                stack.pop()
            case _ if token[2] is not None:
                name = _name(token[1], here.kind)
                here.inside = _annotation(here.kind, name)
                if here.inside is not None and name in here.seen:
                    return name, token.end() - 1
                here.seen.add(name)
            case _:
                pass
    return None


def _name(text: bytes, kind: Any) -> str:
    name: str = _decoder.decode(text)
    return _NAMES.get(kind, {}).get(name, name)


def _annotation(kind: Any, name: str) -> Any:
    """Return what the member `name` of the struct `kind` is to be; None where nobody knows it."""
    return None if kind is None else _members(kind).get(name)


@functools.cache
def _members(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}


def _struct_of(annotation: Any) -> Any:
    """Return the one struct that `annotation` allows."""
    plain = _plain(annotation)
    return plain if isinstance(plain, type) and issubclass(plain, msgspec.Struct) else None


def _member_of(annotation: Any) -> Any:
    """Return what the members of a list are to be."""
    plain = _plain(annotation)
    return get_args(plain)[0] if get_origin(plain) is list else None


def _plain(annotation: Any) -> Any:
    """Return `annotation` without bounds and without None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        wanted = [each for each in get_args(annotation) if each is not type(None)]
        return _plain(wanted[0]) if len(wanted) == 1 else None
    return annotation
