"""Errors of the configuration.

ValidationError            a rule of the configuration is broken (HTTP 400)
├── IdentifierNotUnique    (HTTP 409)
└── DuplicateDevicePath    (HTTP 409)
DecodeError                JSON that is not the configuration (HTTP 400)
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class ValidationError(VmmError):
    """Root of the rules of config.md section 12; each rule has a class of its own beside its struct."""


class IdentifierNotUnique(ValidationError):
    def __init__(self, identifier: str) -> None:
        super().__init__(f"Identifier {identifier} is not unique")


class InvalidIdentifier(ValidationError):
    def __init__(self, identifier: str) -> None:
        super().__init__(f"Identifier {identifier} is not valid")


class DuplicateDevicePath(ValidationError):
    def __init__(self, path: str) -> None:
        super().__init__(f"Duplicated device path: {path}")


class DecodeError(VmmError):
    """JSON that does not deserialize; the text is the decoder's."""
