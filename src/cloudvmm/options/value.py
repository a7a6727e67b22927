"""Types of the values in option strings: how each is read and written, and how help shows it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from cloudvmm.config.address import canonical_ip, canonical_mac
from cloudvmm.config.cpu import CpuTopology
from cloudvmm.options.error import GrammarError
from cloudvmm.options.grammar import dequote, enquote, split_commas

T = TypeVar("T")
K = TypeVar("K")
S = TypeVar("S")
E = TypeVar("E", bound=enum.Enum)

_LONGEST_LIST = 1 << 20
_SUFFIXES = {"K": 10, "M": 20, "G": 30}
_TOGGLES = {"on": True, "true": True, "off": False, "false": False}


class ValueType(Generic[T]):
    """`parse` reads a value's text or raises ValueError; `format` writes text that reads back as the value.

    `syntax` is what help shows, `choices` are the words where there are only these.
    """

    __slots__ = ("choices", "format", "parse", "syntax")

    def __init__(
        self,
        parse: Callable[[str], T],
        format: Callable[[T], str],
        *,
        syntax: str,
        choices: tuple[str, ...] = (),
    ) -> None:
        self.parse = parse
        self.format = format
        self.syntax = syntax
        self.choices = choices


def unsigned(bits: int) -> ValueType[int]:
    return ValueType(lambda text: parse_integer(dequote(text), 0, (1 << bits) - 1), str, syntax="<number>")


def bare_unsigned(bits: int) -> ValueType[int]:
    """A number within a list, where quotes have no meaning."""
    return ValueType(lambda text: parse_integer(text, 0, (1 << bits) - 1), str, syntax="<number>")


def bare_truncated(bits: int, *, is_signed: bool = False) -> ValueType[int]:
    """A number within a list; of one that does not fit only the low bits are kept, as the reference does."""
    return ValueType(
        lambda text: _truncate(parse_u64(text), bits, is_signed=is_signed),
        lambda number: str(number & ((1 << bits) - 1)),
        syntax="<number>",
    )


def choice(members: Mapping[str, E], *, is_exact: bool = False) -> ValueType[E]:
    """One of the words in `members`, in any letter case unless `is_exact`."""
    words = {member: word for word, member in members.items()}

    def parse(text: str) -> E:
        word = dequote(text)
        try:
            return members[word if is_exact else word.lower()]
        except KeyError:
            raise ValueError(text) from None

    def write(member: E) -> str:
        if member not in words:
            raise ValueError(member)
        return words[member]

    return ValueType(parse, write, syntax="|".join(members), choices=tuple(members))


def integer_list(bits: int) -> ValueType[list[int]]:
    """`[1,3-5]`; a number that does not fit is refused."""
    return ValueType(
        lambda text: parse_integer_list(text, bits), format_integer_list, syntax="[<number>,<first>-<last>]"
    )


def truncated_integer_list(bits: int, *, is_signed: bool = False) -> ValueType[list[int]]:
    """`[1,3-5]`; of a number that does not fit only the low bits are kept, as the reference does."""
    return ValueType(
        lambda text: [
            _truncate(number, bits, is_signed=is_signed) for number in parse_integer_list(text, 64)
        ],
        lambda numbers: format_integer_list([number & ((1 << bits) - 1) for number in numbers]),
        syntax="[<number>,<first>-<last>]",
    )


def tuple_list(
    key: ValueType[K],
    value: ValueType[T],
    *,
    make: Callable[[K, T], S],
    split: Callable[[S], tuple[K, T]],
    syntax: str,
) -> ValueType[list[S]]:
    """`[k@v,k2@v2]`, each pair of which is an `S`."""

    def parse(text: str) -> list[S]:
        return [make(key.parse(first), value.parse(second)) for first, second in _split_tuples(text)]

    def write(items: list[S]) -> str:
        pairs = [split(item) for item in items]
        return f"[{','.join(f'{key.format(first)}@{value.format(second)}' for first, second in pairs)}]"

    return ValueType(parse, write, syntax=syntax)


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


def format_integer_list(numbers: list[int]) -> str:
    """Write three or more that follow on each other as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"[{','.join(_format_run(run) for run in runs)}]"


def _format_run(run: list[int]) -> str:
    return f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run))


def _truncate(number: int, bits: int, *, is_signed: bool) -> int:
    number &= (1 << bits) - 1
    return number - (1 << bits) if is_signed and number >> (bits - 1) else number


def _parse_string_list(text: str) -> list[str]:
    try:
        return split_commas(text.strip().strip("[]"))
    except GrammarError as error:
        raise ValueError(text) from error


def _format_string_list(texts: list[str]) -> str:
    # Quotes would stay in the text, so what needs them cannot be written; see `Schema.format`.
    return f"[{','.join(texts)}]"


def _split_tuples(text: str) -> list[tuple[str, str]]:
    body = text.strip()
    if len(body) < 2 or body[0] != "[" or body[-1] != "]":
        raise ValueError(text)
    try:
        pairs = split_commas(body[1:-1])
    except GrammarError as error:
        raise ValueError(text) from error
    return [_split_tuple(pair.strip()) for pair in pairs]


def _split_tuple(pair: str) -> tuple[str, str]:
    is_quoted = False
    ats: list[int] = []
    for index, letter in enumerate(pair):
        if letter == '"':
            is_quoted = not is_quoted
        elif letter == "@" and not is_quoted:
            ats.append(index)
    if len(ats) != 1 or ats[0] == 0:
        raise ValueError(pair)
    return pair[: ats[0]], pair[ats[0] + 1 :]


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


def format_byte_size(size: int) -> str:
    """Write bytes with the largest suffix that loses nothing."""
    for suffix in ("G", "M", "K"):
        count, rest = divmod(size, 1 << _SUFFIXES[suffix])
        if count and not rest:
            return f"{count}{suffix}"
    return str(size)


def _parse_topology(text: str) -> CpuTopology:
    parts = [parse_integer(part, 0, 0xFFFF) for part in dequote(text).split(":")]
    if len(parts) != 4:
        raise ValueError(text)
    threads, cores, dies, packages = parts
    return CpuTopology(
        threads_per_core=threads, cores_per_die=cores, dies_per_package=dies, packages=packages
    )


def _format_topology(topology: CpuTopology) -> str:
    cores, dies = topology.cores_per_die, topology.dies_per_package
    return f"{topology.threads_per_core}:{cores}:{dies}:{topology.packages}"


TEXT: ValueType[str] = ValueType(dequote, enquote, syntax="<text>")
TUPLE_KEY: ValueType[str] = ValueType(dequote, lambda text: enquote(text, more="@"), syntax="<text>")
PATH: ValueType[str] = ValueType(dequote, enquote, syntax="<path>")
TOGGLE: ValueType[bool] = ValueType(
    _parse_toggle, lambda is_on: "on" if is_on else "off", syntax="on|off", choices=("on", "off")
)
BYTE_SIZED: ValueType[int] = ValueType(parse_byte_size, format_byte_size, syntax="<size>[K|M|G]")
U8 = unsigned(8)
U16 = unsigned(16)
U32 = unsigned(32)
U64 = unsigned(64)
I32: ValueType[int] = ValueType(
    lambda text: parse_integer(dequote(text), -(1 << 31), (1 << 31) - 1), str, syntax="<number>"
)
STRING_LIST: ValueType[list[str]] = ValueType(
    _parse_string_list, _format_string_list, syntax="[<text>,<text>]"
)
TOPOLOGY: ValueType[CpuTopology] = ValueType(
    _parse_topology,
    _format_topology,
    syntax="<threads_per_core>:<cores_per_die>:<dies_per_package>:<packages>",
)
IP: ValueType[str] = ValueType(lambda text: canonical_ip(dequote(text)), enquote, syntax="<ip_addr>")
MAC: ValueType[str] = ValueType(lambda text: canonical_mac(dequote(text)), enquote, syntax="<mac_addr>")

AnyValueType = ValueType[Any]
