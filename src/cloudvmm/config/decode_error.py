"""Why a body does not decode, in the words that clients of the reference know."""

from __future__ import annotations

import re

import msgspec

_MISSING = re.compile(r"Object missing required field `(?P<field>[^`]*)`")
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<field>[^`]*)`")
_WRONG_TYPE = re.compile(r"Expected `(?P<expected>[^`]*)`, got `(?P<got>[^`]*)`")
_OUT_OF_RANGE = re.compile(r"Expected `int` (?P<operator>>=|<=) (?P<bound>-?\d+)")
_UNKNOWN_VARIANT = re.compile(r"Invalid enum value '?(?P<value>[^']*)'?")
_PATH = re.compile(r" - at `(?P<path>\$[^`]*)`$")
_BYTE = re.compile(r"\(byte (?P<offset>\d+)\)$")

_GOT = {"str": "string", "int": "integer", "float": "floating point", "bool": "boolean",
        "object": "map", "array": "sequence"}  # fmt: skip
_EXPECTED = {"str": "a string", "int": "an integer", "bool": "a boolean", "object": "a map",
             "array": "a sequence", "float": "a number", "null": "null"}  # fmt: skip
_INTEGER_KINDS = {0xFF: "u8", 0xFFFF: "u16", 0xFFFF_FFFF: "u32", 0x7FFF_FFFF: "i32"}


def explain(error: Exception, raw: bytes, kind: type) -> str:
    """Say what is wrong with `raw` and where: at a line and column, or at a path within a `kind`."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return _explain_syntax(error, raw)
    path = _PATH.search(text)
    where = path["path"] if path else "$"
    return f"{_explain_value(text, kind if where == '$' else None)} at {_place(where, raw)}"


def explain_duplicate(name: str, offset: int, raw: bytes) -> str:
    """Say that the member `name` is given twice; `offset` is where its second value's colon is."""
    return f"duplicate field `{name}` at {_line_and_column(raw, offset)}"


def _explain_value(text: str, kind: type | None) -> str:
    if match := _MISSING.search(text):
        return f"missing field `{match['field']}`"
    if match := _UNKNOWN_FIELD.search(text):
        return f"unknown field `{match['field']}`"
    if match := _WRONG_TYPE.search(text):
        got = _GOT.get(match["got"], match["got"])
        return f"invalid type: {got}, expected {_expected(match['expected'], kind)}"
    if match := _OUT_OF_RANGE.search(text):
        return f"invalid value: integer, expected {_integer_kind(match['operator'], int(match['bound']))}"
    if match := _UNKNOWN_VARIANT.search(text):
        return f"unknown variant `{match['value']}`"
    return _PATH.sub("", text)


def _expected(names: str, kind: type | None) -> str:
    words = [name for name in names.split(" | ") if name != "null"] or ["null"]
    if words == ["object"] and " | " not in names:
        return "a map" if kind is None or not issubclass(kind, msgspec.Struct) else f"struct {kind.__name__}"
    return " or ".join(_EXPECTED.get(word, word) for word in words)


def _integer_kind(operator: str, bound: int) -> str:
    if operator == "<=":
        return _INTEGER_KINDS.get(bound, f"at most {bound}")
    return {0: "an unsigned integer", -0x8000_0000: "i32"}.get(bound, f"at least {bound}")


def _place(path: str, raw: bytes) -> str:
    if path == "$":
        return _line_and_column(raw, len(raw.rstrip()))
    return f"`{path}`"


def _explain_syntax(error: Exception, raw: bytes) -> str:
    text = str(error)
    if isinstance(error, RecursionError):
        return "recursion limit exceeded"
    if text == "Input data was truncated":
        return f"EOF while parsing a value at {_line_and_column(raw, len(raw))}"
    match = _BYTE.search(text)
    if match is None:
        return text
    reason = text[: match.start()].removeprefix("JSON is malformed:").strip()
    return f"{reason} at {_line_and_column(raw, int(match['offset']) + 1)}"


def _line_and_column(raw: bytes, offset: int) -> str:
    """Both are 1-based; `offset` counts the bytes up to and including the one meant."""
    seen = raw[:offset]
    line = seen.count(b"\n") + 1
    column = len(seen) - (seen.rfind(b"\n") + 1)
    return f"line {line} column {column}"
