"""Errors of option strings, chained the way the reference prints them.

OptionError
├── GrammarError              about the text, whatever it is for
│   ├── UnknownOption
│   ├── InvalidSyntax
│   ├── Conversion
│   └── InvalidValue
├── ParseError                which flag was meant; caused by a GrammarError
├── MissingKey                a flag lacks a key it cannot do without
├── ValidationFailed          caused by a rule of the configuration
├── Unprintable               the other way round: no string gives this configuration
└── InvalidCpuFeatures, InvalidConsoleMode, FsTagTooLong, ForwardWithoutUser, GenericDeviceTypeInvalid,
    GenericDeviceTypeUnsupported
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class OptionError(VmmError):
    """Root of the tree; never raised itself. `hint` tells what is allowed, in no text of the reference."""

    hint: str | None = None


def hint_of(error: BaseException) -> str | None:
    """Return what is allowed instead, as the first of `error` and its causes to have a `hint` tells."""
    cause: BaseException | None = error
    while cause is not None:
        hint: str | None = getattr(cause, "hint", None)
        if hint is not None:
            return hint
        cause = cause.__cause__
    return None


class GrammarError(OptionError):
    """Root of what can be wrong with the text alone."""


class UnknownOption(GrammarError):
    def __init__(self, key: str) -> None:
        super().__init__(f"Unknown option: {key}")


class InvalidSyntax(GrammarError):
    def __init__(self, text: str) -> None:
        super().__init__(f"Invalid syntax: {text}")


class Conversion(GrammarError):
    def __init__(self, key: str, value: str) -> None:
        super().__init__(f"Unable to convert {value} for {key}")


class InvalidValue(GrammarError):
    def __init__(self, text: str) -> None:
        super().__init__(f"Invalid value: {text}")


class ParseError(OptionError):
    """`what` is the flag, or what an operation calls its parameters."""

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(f"Error parsing {what}")
        self.hint = hint


class MissingKey(OptionError):
    def __init__(self, what: str, missing: str, *, hint: str | None = None) -> None:
        super().__init__(f"Error parsing {what}: {missing}")
        self.hint = hint


class ValidationFailed(OptionError):
    """Error validating configuration"""

    def __init__(self, *, hint: str | None = None) -> None:
        super().__init__()
        self.hint = hint


class Unprintable(OptionError):
    def __init__(self, what: str, member: str | None = None) -> None:
        super().__init__(f"{what} has no form for this {member or 'configuration'}")


class InvalidCpuFeatures(OptionError):
    hint = "features=[amx]"

    def __init__(self, feature: str) -> None:
        super().__init__(f"Invalid feature in --cpus features list: {feature}")


class InvalidConsoleMode(OptionError):
    """`what` is the flag; the reference says `--console` of the serial one, too."""

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(f"Error parsing {what}: invalid console mode given")
        self.hint = hint


class FsTagTooLong(OptionError):
    """Error parsing --fs: max tag length is 36"""


class GenericDeviceTypeInvalid(OptionError):
    def __init__(self, text: str, *, hint: str | None = None) -> None:
        super().__init__(
            f'Error parsing --generic-vhost-user: device_type "{text}" invalid '
            "(leading zeros or unknown string)"
        )
        self.hint = hint


class GenericDeviceTypeUnsupported(OptionError):
    def __init__(self, text: str) -> None:
        super().__init__(
            f'Error parsing --generic-vhost-user: device with device_type "{text}" '
            "cannot be implemented via vhost-user"
        )
