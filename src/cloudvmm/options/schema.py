"""Which keys an option string may have, what each means, and how a string is read and written by them.

One `Schema` per flag: the single place from which parsing, printing, help and completion come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import msgspec

from cloudvmm.options.error import GrammarError, MissingKey, OptionError, ParseError, Unprintable
from cloudvmm.options.grammar import Options, parse_options
from cloudvmm.options.value import TEXT, TOGGLE, U8, U16, AnyValueType

C = TypeVar("C", bound=msgspec.Struct)

_PCI_COMMON = "common PCI device config"


class Key:
    """One key: its type, the member of the struct that it sets, and in `help` what that is for.

    `member` defaults to the key's own name. When the key is not given, `missing` says so in an error
    of its own, `missing_cause` in the cause of a ParseError; else the member's value is `default`, or
    the struct's own default. A key that `is_old` is read and neither written nor shown.
    """

    __slots__ = (
        "default",
        "help",
        "is_old",
        "is_pci_common",
        "kind",
        "member",
        "missing",
        "missing_cause",
        "name",
    )

    def __init__(
        self,
        name: str,
        kind: AnyValueType,
        help: str,
        *,
        member: str | None = None,
        missing: str | None = None,
        missing_cause: Callable[[], GrammarError] | None = None,
        default: Any = None,
        is_pci_common: bool = False,
        is_old: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.help = help
        self.member = member or name
        self.missing = missing
        self.missing_cause = missing_cause
        self.default = default
        self.is_pci_common = is_pci_common
        self.is_old = is_old

    @property
    def is_required(self) -> bool:
        return self.missing is not None or self.missing_cause is not None

    @property
    def syntax(self) -> str:
        return f"{self.name}={self.kind.syntax}"


class Schema:
    """The keys of the flag `what` (`--disk`), which make a `struct`, in the order in which they are read.

    The order decides which of two faults is reported. `flags` are keys without a value.
    """

    __slots__ = ("flags", "keys", "struct", "what")

    def __init__(
        self, what: str, struct: type[msgspec.Struct], *keys: Key, flags: tuple[str, ...] = ()
    ) -> None:
        self.what = what
        self.struct = struct
        self.keys = keys
        self.flags = flags

    @property
    def shown_keys(self) -> list[Key]:
        """Keys for users: no old ones, none for tests only."""
        return [key for key in self.keys if not key.is_old and not key.name.startswith("_")]

    @property
    def syntax(self) -> str:
        """`off|tty,file=<path>`: every key, for help."""
        keys = [key.syntax for key in self.shown_keys]
        return ",".join(["|".join(self.flags), *keys] if self.flags else keys)

    def parse(self, text: str) -> Options:
        """:raises ParseError: with a GrammarError as its cause."""
        try:
            return parse_options(text, [key.name for key in self.keys], flags=self.flags)
        except GrammarError as error:
            raise ParseError(self.what, hint=self.syntax) from error

    def members(self, text: str) -> dict[str, Any]:
        """Read `text` into members of a struct; a key that is absent or empty gives none.

        :raises OptionError: as the reference words it.
        """
        return self.convert(self.parse(text), self.keys)

    def convert(self, options: Options, keys: Sequence[Key]) -> dict[str, Any]:
        """As `members`, of `keys` only.

        :raises OptionError: as the reference words it.
        """
        members: dict[str, Any] = {}
        for key in keys:
            try:
                value = options.convert(key.name, key.kind.parse)
            except GrammarError as error:
                what = _PCI_COMMON if key.is_pci_common else self.what
                raise ParseError(what, hint=key.syntax) from error
            if value is None:
                self._check_may_miss(key)
                value = key.default
            if value is not None:
                members[key.member] = value
        return members

    def format(
        self,
        config: C,
        parse: Callable[[str], C],
        *,
        flag: str | None = None,
        always: Collection[str] = (),
        **members: Any,
    ) -> str:
        """Write `config` as a string that `parse` reads back: `flag`, and each key not at its default.

        Members are overridden by `members`; those in `always` are written at their default, too.

        :raises Unprintable: no option string gives `config`.
        """
        values = {**msgspec.structs.asdict(config), **members}
        try:
            text = ",".join([*([] if flag is None else [flag]), *self._format_keys(values, always)])
            back = parse(text)
        except (OptionError, ValueError) as error:
            raise Unprintable(self.what) from error
        for member in config.__struct_fields__:
            if getattr(back, member) != getattr(config, member):
                raise Unprintable(self.what, member)
        return text

    def default_of(self, key: Key) -> Any:
        """Return what the member is without `key`; None where it is then unset, or `key` is required."""
        if key.default is not None or key.is_required:
            return key.default
        for field in msgspec.structs.fields(self.struct):
            if field.name == key.member:
                if field.default_factory is not msgspec.NODEFAULT:
                    return field.default_factory()
                return None if field.default in (msgspec.NODEFAULT, msgspec.UNSET) else field.default
        return None

    def _format_keys(self, values: dict[str, Any], always: Collection[str]) -> list[str]:
        parts = []
        for key in self.keys:
            value = None if key.is_old else values.get(key.member)
            if value not in (None, msgspec.UNSET) and (key.member in always or value != self.default_of(key)):
                parts.append(f"{key.name}={key.kind.format(value)}")
        return parts

    def _check_may_miss(self, key: Key) -> None:
        if key.missing is not None:
            raise MissingKey(self.what, key.missing, hint=self.syntax)
        if key.missing_cause is not None:
            raise ParseError(self.what, hint=self.syntax) from key.missing_cause()


_ID = Key("id", TEXT, "Identifier, unique in the VM; made up if not given", is_pci_common=True)
_IOMMU = Key("iommu", TOGGLE, "Whether to place the device behind the virtual IOMMU", is_pci_common=True)
_PLACE = (
    Key("pci_segment", U16, "PCI segment that the device goes to", is_pci_common=True),
    Key(
        "pci_device_id",
        U8,
        "Slot on the segment, 0 to 31; the first free one if not given",
        is_pci_common=True,
    ),
)

PCI_KEYS = (_ID, *_PLACE)
"""Of a device that cannot be placed behind the IOMMU."""

PCI_KEYS_IOMMU = (_ID, _IOMMU, *_PLACE)
