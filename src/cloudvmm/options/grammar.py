"""The grammar of option strings: `key=value,flag,key="quoted, value",key=[a,[b,c]]`.

Only the text is looked at here. What a value means is in `options/value.py`, which keys a resource
has in the file of that resource.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from cloudvmm.options.error import Conversion, InvalidSyntax, UnknownOption

T = TypeVar("T")


class Options:
    """The keys of one option string, as text; a key given twice has its last value."""

    __slots__ = ("_values",)

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def store(self, key: str, value: str) -> None:
        self._values[key] = value

    def is_set(self, key: str) -> bool:
        """Whether the key was given at all, `key=` and flags included."""
        return key in self._values

    def get(self, key: str) -> str | None:
        """Return the value without its quotes; None where it is absent or empty."""
        raw = self._values.get(key)
        return dequote(raw) if raw else None

    def convert(self, key: str, parse: Callable[[str], T]) -> T | None:
        """Return the value read by `parse`; None where it is absent or empty.

        :raises Conversion: when `parse` raises ValueError.
        """
        raw = self._values.get(key)
        if not raw:
            return None
        try:
            return parse(raw)
        except ValueError:
            raise Conversion(key, raw) from None


def parse_options(text: str, keys: Collection[str], *, flags: Collection[str] = ()) -> Options:
    """Read `text`, in which `keys` need a value and `flags` have none.

    :raises UnknownOption: for a key that is neither.
    :raises InvalidSyntax: for a key without `=`, or quotes or brackets left open.
    """
    options = Options()
    read_options(options, text, keys, flags=flags)
    return options


def read_options(options: Options, text: str, keys: Collection[str], *, flags: Collection[str] = ()) -> None:
    """As `parse_options`; when it raises, `options` holds what was read before the fault."""
    if not text.strip():
        return
    for option in split_commas(text):
        key, equals, value = option.partition("=")
        if key in flags:
            options.store(key, "")
        elif key not in keys:
            raise UnknownOption(key)
        elif not equals:
            raise InvalidSyntax(option)
        else:
            options.store(key, value.strip())


def split_commas(text: str) -> list[str]:
    """Split at commas outside of quotes and brackets.

    :raises InvalidSyntax: when quotes or brackets are unbalanced.
    """
    parts: list[str] = []
    current: list[str] = []
    depth = 0
    is_quoted = False
    for letter in text.strip():
        if letter == '"':
            is_quoted = not is_quoted
        elif is_quoted:
            pass
        elif letter == "[":
            depth += 1
        elif letter == "]":
            depth -= 1
            if depth < 0:
                raise InvalidSyntax(text)
        elif letter == "," and depth == 0:
            parts.append("".join(current))
            current.clear()
            continue
        current.append(letter)
    if is_quoted or depth:
        raise InvalidSyntax(text)
    parts.append("".join(current))
    return parts


def dequote(text: str) -> str:
    """Remove quotes; two in a row inside of quotes stand for one."""
    if '"' not in text:
        return text
    letters: list[str] = []
    is_quoted = False
    previous = ""
    for letter in text:
        if letter != '"':
            letters.append(letter)
        else:
            if previous == '"' and not is_quoted:
                letters.append('"')
            is_quoted = not is_quoted
        previous = letter
    return "".join(letters)


def enquote(text: str, *, more: str = "") -> str:
    """Write `text` as a value that reads back as it: in quotes where it is empty or a letter has a meaning.

    The letters in `more` have one as well where the value goes.
    """
    has_meaning = any(letter in text for letter in f',[]"{more}')
    if text and text == text.strip() and not has_meaning:
        return text
    return '"' + text.replace('"', '""') + '"'
