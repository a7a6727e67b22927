"""Network addresses in their canonical text form."""

from __future__ import annotations

import re
import socket

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")


def canonical_mac(text: str) -> str:
    """:raises ValueError: unless `text` is six pairs of hexadecimal digits joined by colons."""
    if not _MAC.fullmatch(text):
        raise ValueError(f"parsing of {text} into a MAC address failed")
    return text.lower()


def canonical_ip(text: str) -> str:
    """:raises ValueError: unless `text` is an IPv4 or IPv6 address."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, text))
    except OSError:
        raise ValueError("invalid IP address syntax") from None
