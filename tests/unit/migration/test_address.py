"""Where a migration goes, as the reference reads it."""

from __future__ import annotations

import pytest

from cloudvmm.errors import error_chain
from cloudvmm.migration.address import AddressError, TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("unix:/a/b", UnixAddress("/a/b")),
        ("unix:relative", UnixAddress("relative")),
        ("tcp:host:1", TcpAddress("host", 1)),
        ("tcp:10.0.0.1:65535", TcpAddress("10.0.0.1", 65535)),
        ("tcp:[::1]:0", TcpAddress("::1", 0)),
        ("tcp:::1:80", TcpAddress("::1", 80)),
        ("tcp:host:+080", TcpAddress("host", 80)),
        ("unix:", None),
        ("unix:/a\0b", None),
        ("", None),
        ("/path", None),
        ("file:///x", None),
        ("UNIX:/x", None),
    ],
)
def test_url_becomes_an_address(url, address):
    assert parse_address(url) == address


@pytest.mark.parametrize(
    ("url", "chain"),
    [
        ("tcp:[::1:80", ["Missing closing ']' for bracketed IPv6 address"]),
        ("tcp:[::1]", ["Missing port separator after bracketed host"]),
        ("tcp:[::1]80", ["Missing port separator after bracketed host"]),
        ("tcp:host", ["Missing TCP port"]),
        ("tcp:", ["Missing TCP port"]),
        ("tcp::80", ["Host must not be empty"]),
        ("tcp:[]:80", ["Host must not be empty"]),
        ("tcp:host:", ["Port must not be empty"]),
        ("tcp:host:x", ["Invalid TCP port: x", "invalid digit found in string"]),
        ("tcp:host:-1", ["Invalid TCP port: -1", "invalid digit found in string"]),
        ("tcp:host:65536", ["Invalid TCP port: 65536", "number too large to fit in target type"]),
        (
            "tcp:host:" + "9" * 5000,
            ["Invalid TCP port: " + "9" * 5000, "number too large to fit in target type"],
        ),
    ],
)
def test_address_that_is_none_says_what_is_wrong(url, chain):
    with pytest.raises(AddressError) as caught:
        parse_address(url)
    assert error_chain(caught.value) == chain
