"""Which keys an option string may have, what each means, and how a string is read by them.

One `Schema` per flag: the single place from which parsing, help and completion come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cloudvmm.options.error import GrammarError, MissingKey, ParseError
from cloudvmm.options.grammar import Options, parse_options
from cloudvmm.options.value import TEXT, TOGGLE, U8, U16, AnyValueType

_PCI_COMMON = "common PCI device config"


class Key:
    """One key: its type, and the member of the struct that it sets.

    `member` defaults to the key's own name. When the key is not given, `missing` says so in an error
    of its own, `missing_cause` in the cause of a ParseError; else the member's value is `default`, or
    the struct's own default.
    """

    __slots__ = ("default", "is_pci_common", "kind", "member", "missing", "missing_cause", "name")

    def __init__(
        self,
        name: str,
        kind: AnyValueType,
        *,
        member: str | None = None,
        missing: str | None = None,
        missing_cause: Callable[[], GrammarError] | None = None,
        default: Any = None,
        is_pci_common: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.member = member or name
        self.missing = missing
        self.missing_cause = missing_cause
        self.default = default
        self.is_pci_common = is_pci_common


class Schema:
    """The keys of the flag `what` (`--disk`), in the order in which they are read.

    The order decides which of two faults is reported. `flags` are keys without a value.
    """

    __slots__ = ("flags", "keys", "what")

    def __init__(self, what: str, *keys: Key, flags: tuple[str, ...] = ()) -> None:
        self.what = what
        self.keys = keys
        self.flags = flags

    def parse(self, text: str) -> Options:
        """:raises ParseError: with a GrammarError as its cause."""
        try:
            return parse_options(text, [key.name for key in self.keys], flags=self.flags)
        except GrammarError as error:
            raise ParseError(self.what) from error

    def members(self, text: str) -> dict[str, Any]:
        """Read `text` into members of a struct; a key that is absent or empty gives none.

        :raises OptionError: as the reference words it.
        """
        return self.convert(self.parse(text))

    def convert(self, options: Options) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for key in self.keys:
            try:
                value = options.convert(key.name, key.kind.parse)
            except GrammarError as error:
                raise ParseError(_PCI_COMMON if key.is_pci_common else self.what) from error
            if value is None:
                self._check_may_miss(key)
                value = key.default
            if value is not None:
                members[key.member] = value
        return members

    def _check_may_miss(self, key: Key) -> None:
        if key.missing is not None:
            raise MissingKey(self.what, key.missing)
        if key.missing_cause is not None:
            raise ParseError(self.what) from key.missing_cause()


_ID = Key("id", TEXT, is_pci_common=True)
_IOMMU = Key("iommu", TOGGLE, is_pci_common=True)
_PLACE = (
    Key("pci_segment", U16, is_pci_common=True),
    Key("pci_device_id", U8, is_pci_common=True),
)

PCI_KEYS = (_ID, *_PLACE)
"""Of a device that cannot be placed behind the IOMMU."""

PCI_KEYS_IOMMU = (_ID, _IOMMU, *_PLACE)
