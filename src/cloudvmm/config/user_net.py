"""User-mode networking: a network for one guest that needs no rights on the host. Beyond the reference."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence

import msgspec

from cloudvmm.config.error import ValidationError

_FORWARD = re.compile(r"(tcp|udp):([0-9.]+):([0-9]{1,5}):([0-9]{1,5})", re.ASCII)
_LAST_PORT = 0xFFFF


class UserNetConfig(msgspec.Struct, kw_only=True):
    """`forwards` are ports of the host that lead to the guest: ``PROTOCOL:ADDRESS:PORT:GUEST_PORT``."""

    forwards: list[str] = msgspec.field(default_factory=list)


class Forward(msgspec.Struct, frozen=True):
    """Who connects to `port` of the host's `address` reaches `guest_port` of the guest."""

    protocol: str
    address: str
    port: int
    guest_port: int


class InvalidForward(ValidationError):
    def __init__(self, text: str) -> None:
        super().__init__(
            f'Forward "{text}" is not valid: it is PROTOCOL:ADDRESS:PORT:GUEST_PORT, '
            "such as tcp:127.0.0.1:8080:80"
        )


class DuplicateForward(ValidationError):
    def __init__(self, text: str) -> None:
        super().__init__(f'Forward "{text}" has the protocol, the address and the port of another one')


def parse_forward(text: str) -> Forward:
    """Read one forward: TCP or UDP, an IPv4 address of the host, two ports from 1 on.

    :raises InvalidForward: `text` is none.
    """
    match = _FORWARD.fullmatch(text)
    if match is None:
        raise InvalidForward(text)
    protocol, address, port, guest_port = match[1], match[2], int(match[3]), int(match[4])
    try:
        socket.inet_pton(socket.AF_INET, address)
    except OSError:
        raise InvalidForward(text) from None
    if not (0 < port <= _LAST_PORT and 0 < guest_port <= _LAST_PORT):
        raise InvalidForward(text)
    return Forward(protocol, address, port, guest_port)


def check_forwards(texts: Sequence[str]) -> None:
    """Raise the first rule that one of `texts` breaks."""
    taken = set()
    for text in texts:
        forward = parse_forward(text)
        place = (forward.protocol, forward.address, forward.port)
        if place in taken:
            raise DuplicateForward(text)
        taken.add(place)
