"""Where a migration goes: `unix:<path>`, `tcp:<host>:<port>`, `tcp:[<v6>]:<port>`. Pure."""

from __future__ import annotations

import re

import msgspec

from cloudvmm.migration.error import MigrationError


class AddressError(MigrationError):
    """Root of what is wrong with a TCP address."""


class MissingIpv6ClosingBracket(AddressError):
    """Missing closing ']' for bracketed IPv6 address"""


class MissingPortSeparatorAfterBracketedHost(AddressError):
    """Missing port separator after bracketed host"""


class MissingPort(AddressError):
    """Missing TCP port"""


class EmptyHost(AddressError):
    """Host must not be empty"""


class EmptyPort(AddressError):
    """Port must not be empty"""


class InvalidPort(AddressError):
    def __init__(self, port: str) -> None:
        super().__init__(f"Invalid TCP port: {port}")


class PortNumberError(AddressError):
    """Why a port is no number, in the words of the reference's parser."""


class UnixAddress(msgspec.Struct, frozen=True):
    path: str


class TcpAddress(msgspec.Struct, frozen=True):
    """`host` is a name or a number, IPv6 without brackets."""

    host: str
    port: int


Address = UnixAddress | TcpAddress

_DIGITS = re.compile(r"\+?[0-9]+")


def parse_address(url: str) -> Address | None:
    """Return where `url` leads; None where it has none of the known prefixes, or `unix:` without a path.

    :raises AddressError: it is `tcp:` without a proper host and port.
    """
    if url.startswith("tcp:"):
        return _parse_tcp(url.removeprefix("tcp:"))
    path = url.removeprefix("unix:")
    # The kernel would take a path up to its first NUL.
    return UnixAddress(path) if url.startswith("unix:") and path and "\0" not in path else None


def _parse_tcp(text: str) -> TcpAddress:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket:
            raise MissingIpv6ClosingBracket
        if not rest.startswith(":"):
            raise MissingPortSeparatorAfterBracketedHost
        port = rest[1:]
    else:
        host, colon, port = text.rpartition(":")
        if not colon:
            raise MissingPort
    if not host:
        raise EmptyHost
    if not port:
        raise EmptyPort
    return TcpAddress(host, _parse_port(port))


def _parse_port(text: str) -> int:
    if not _DIGITS.fullmatch(text):
        raise InvalidPort(text) from PortNumberError("invalid digit found in string")
    # Python bounds the digits of an integer; the reference's parser bounds the value.
    if len(text.lstrip("+0")) > 5 or int(text) > 0xFFFF:
        raise InvalidPort(text) from PortNumberError("number too large to fit in target type")
    return int(text)
