"""Types of the values in option strings: how each is read, and how help and completion show it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from cloudvmm.config.address import canonical_ip, canonical_mac
from cloudvmm.config.cpu import CpuTopology
from cloudvmm.options.error import GrammarError
from cloudvmm.options.grammar import dequote, split_commas

T = TypeVar("T")
K = TypeVar("K")
E = TypeVar("E", bound=enum.Enum)

_LONGEST_LIST = 1 << 20
_SUFFIXES = {"K": 10, "M": 20, "G": 30}
_TOGGLES = {"on": True, "true": True, "off": False, "false": False}


class ValueType(Generic[T]):
    """`parse` reads the text of a value or raises ValueError; `syntax` is what help shows for it."""

    __slots__ = ("choices", "parse", "syntax")

    def __init__(self, parse: Callable[[str], T], *, syntax: str, choices: tuple[str, ...] = ()) -> None:
        self.parse = parse
        self.syntax = syntax
        self.choices = choices


def unsigned(bits: int) -> ValueType[int]:
    return ValueType(lambda text: parse_integer(dequote(text), 0, (1 << bits) - 1), syntax="<number>")


def choice(members: Mapping[str, E], *, is_exact: bool = False) -> ValueType[E]:
    """One of the words in `members`, in any letter case unless `is_exact`."""

    def parse(text: str) -> E:
        word = dequote(text)
        try:
            return members[word if is_exact else word.lower()]
        except KeyError:
            raise ValueError(text) from None

    return ValueType(parse, syntax="|".join(members), choices=tuple(members))


def integer_list(bits: int) -> ValueType[list[int]]:
    """`[1,3-5]`; a number that does not fit is refused."""
    return ValueType(lambda text: parse_integer_list(text, bits), syntax="[<number>,<first>-<last>]")


def truncated_integer_list(bits: int, *, is_signed: bool = False) -> ValueType[list[int]]:
    """`[1,3-5]`; of a number that does not fit only the low bits are kept, as the reference does."""

    def parse(text: str) -> list[int]:
        numbers = [truncate(number, bits) for number in parse_integer_list(text, 64)]
        return [number - (1 << bits) if is_signed and number >> (bits - 1) else number for number in numbers]

    return ValueType(parse, syntax="[<number>,<first>-<last>]")


def tuple_list(
    key: Callable[[str], K], value: Callable[[str], T], *, syntax: str
) -> ValueType[list[tuple[K, T]]]:
    """`[k@v,k2@v2]`; `key` sees its text without quotes."""
    return ValueType(lambda text: _parse_tuple_list(text, key, value), syntax=syntax)


def parse_integer(text: str, low: int, high: int) -> int:
    """Read a decimal number within `low` and `high`, inclusive.

    :raises ValueError: for anything else, blanks and underscores included.
    """
    digits = text[1:] if text[:1] == "+" or (text[:1] == "-" and low < 0) else text
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(text)
    number = int(text)
    if not low <= number <= high:
        raise ValueError(text)
    return number


def parse_u64(text: str) -> int:
    return parse_integer(text, 0, 2**64 - 1)


def truncate(number: int, bits: int) -> int:
    return number & ((1 << bits) - 1)


def parse_integer_list(text: str, bits: int) -> list[int]:
    numbers: list[int] = []
    for item in text.strip().strip("[]").split(","):
        first, *rest = [parse_integer(bound, 0, (1 << bits) - 1) for bound in item.split("-")]
        if len(rest) > 1 or (rest and rest[0] <= first):
            raise ValueError(item)
        last = rest[0] if rest else first
        if len(numbers) + last - first >= _LONGEST_LIST:
            raise ValueError(item)
        numbers.extend(range(first, last + 1))
    return numbers


def parse_string_list(text: str) -> list[str]:
    try:
        return split_commas(text.strip().strip("[]"))
    except GrammarError as error:
        raise ValueError(text) from error


def _parse_tuple_list(text: str, key: Callable[[str], K], value: Callable[[str], T]) -> list[tuple[K, T]]:
    body = text.strip()
    if len(body) < 2 or body[0] != "[" or body[-1] != "]":
        raise ValueError(text)
    try:
        pairs = split_commas(body[1:-1])
    except GrammarError as error:
        raise ValueError(text) from error
    return [_parse_tuple(pair.strip(), key, value) for pair in pairs]


def _parse_tuple(pair: str, key: Callable[[str], K], value: Callable[[str], T]) -> tuple[K, T]:
    is_quoted = False
    ats: list[int] = []
    for index, letter in enumerate(pair):
        if letter == '"':
            is_quoted = not is_quoted
        elif letter == "@" and not is_quoted:
            ats.append(index)
    if len(ats) != 1 or ats[0] == 0:
        raise ValueError(pair)
    return key(dequote(pair[: ats[0]])), value(pair[ats[0] + 1 :])


def _parse_toggle(text: str) -> bool:
    try:
        return _TOGGLES[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def parse_byte_size(text: str) -> int:
    """Read bytes: decimal, with an optional upper-case K, M or G (1024-based).

    :raises ValueError: for anything else, and for what does not fit 64 bits.
    """
    word = dequote(text).strip()
    size = parse_u64(word.rstrip("KMG")) << _SUFFIXES.get(word[-1:], 0)
    if size >> 64:
        raise ValueError(text)
    return size


def _parse_topology(text: str) -> CpuTopology:
    parts = [parse_integer(part, 0, 0xFFFF) for part in dequote(text).split(":")]
    if len(parts) != 4:
        raise ValueError(text)
    threads, cores, dies, packages = parts
    return CpuTopology(
        threads_per_core=threads, cores_per_die=cores, dies_per_package=dies, packages=packages
    )


TEXT: ValueType[str] = ValueType(dequote, syntax="<text>")
PATH: ValueType[str] = ValueType(dequote, syntax="<path>")
TOGGLE: ValueType[bool] = ValueType(_parse_toggle, syntax="on|off", choices=("on", "off"))
BYTE_SIZED: ValueType[int] = ValueType(parse_byte_size, syntax="<size>[K|M|G]")
U8 = unsigned(8)
U16 = unsigned(16)
U32 = unsigned(32)
U64 = unsigned(64)
I32: ValueType[int] = ValueType(
    lambda text: parse_integer(dequote(text), -(1 << 31), (1 << 31) - 1), syntax="<number>"
)
STRING_LIST: ValueType[list[str]] = ValueType(parse_string_list, syntax="[<text>,<text>]")
TOPOLOGY: ValueType[CpuTopology] = ValueType(
    _parse_topology, syntax="<threads_per_core>:<cores_per_die>:<dies_per_package>:<packages>"
)
IP: ValueType[str] = ValueType(lambda text: canonical_ip(dequote(text)), syntax="<ip_addr>")
MAC: ValueType[str] = ValueType(lambda text: canonical_mac(dequote(text)), syntax="<mac_addr>")

AnyValueType = ValueType[Any]
