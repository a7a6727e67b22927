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
└── InvalidCpuFeatures, InvalidConsoleMode, FsTagTooLong, GenericDeviceTypeInvalid,
    GenericDeviceTypeUnsupported
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class OptionError(VmmError):
    """Root of the tree; never raised itself."""


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

    def __init__(self, what: str) -> None:
        super().__init__(f"Error parsing {what}")


class MissingKey(OptionError):
    def __init__(self, what: str, missing: str) -> None:
        super().__init__(f"Error parsing {what}: {missing}")


class ValidationFailed(OptionError):
    """Error validating configuration"""


class InvalidCpuFeatures(OptionError):
    def __init__(self, feature: str) -> None:
        super().__init__(f"Invalid feature in --cpus features list: {feature}")


class InvalidConsoleMode(OptionError):
    """Error parsing --console: invalid console mode given"""


class FsTagTooLong(OptionError):
    """Error parsing --fs: max tag length is 36"""


class GenericDeviceTypeInvalid(OptionError):
    def __init__(self, text: str) -> None:
        super().__init__(
            f'Error parsing --generic-vhost-user: device_type "{text}" invalid '
            "(leading zeros or unknown string)"
        )


class GenericDeviceTypeUnsupported(OptionError):
    def __init__(self, text: str) -> None:
        super().__init__(
            f'Error parsing --generic-vhost-user: device with device_type "{text}" '
            "cannot be implemented via vhost-user"
        )
