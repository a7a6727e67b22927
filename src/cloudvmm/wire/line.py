"""One line of an HTTP request: the request line and the header lines.

The grammar is the reference server's, which is narrower than HTTP/1.1 in places and wider in others
(docs/adr/0004-http-grammar.md). Both functions depend on nothing but their line, and clients repeat
themselves, so the lines seen last are remembered.
"""

from __future__ import annotations

import functools

from cloudvmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

EXPECT_CONTINUE: Final = -1
OTHER: Final = -2

_METHODS: Final = frozenset((b"GET", b"PUT", b"PATCH", b"DELETE"))
_VERSIONS: Final = frozenset((b"HTTP/1.0", b"HTTP/1.1"))
_SCHEME: Final = "http://"
_U32_MAX: Final = 0xFFFF_FFFF
# Unicode's White_Space property; str.strip() without it would also take the separators 1C to 1F.
_WHITE_SPACE: Final = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


class InvalidRequest(VmmError):
    """Invalid request.

    The bytes are no HTTP request.
    """

    # These texts are sent to the client as they are, so they end as the reference's do: with a full stop.


class UnsupportedMethod(InvalidRequest):
    """Invalid HTTP Method: Unsupported HTTP method.

    GET, PUT, PATCH and DELETE are known.
    """


class UnsupportedVersion(InvalidRequest):
    """Invalid HTTP Version: Unsupported HTTP version.

    HTTP/1.0 and HTTP/1.1 are known.
    """


class InvalidUri(InvalidRequest):
    """The target is empty or not UTF-8."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Invalid URI: {reason}")


class InvalidHeader(InvalidRequest):
    """A header line that cannot be served."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Invalid header. Reason: {reason}")


@functools.lru_cache(maxsize=64)
def parse_request_line(line: bytes) -> tuple[str, str]:
    """Return method and path; the path is empty where the target has a form that names none.

    :raises InvalidRequest: the line is not ``METHOD SP TARGET SP VERSION``, or one of them is not known.
    """
    method, _, rest = line.partition(b" ")
    target, space, version = rest.partition(b" ")
    if not space:
        raise InvalidRequest
    if method not in _METHODS:
        raise UnsupportedMethod
    path = _path(target)
    if version not in _VERSIONS:
        raise UnsupportedVersion
    return method.decode(), path


def _path(target: bytes) -> str:
    if not target:
        raise InvalidUri("Empty URI not allowed.")
    try:
        text = target.decode()
    except UnicodeDecodeError:
        raise InvalidUri("Cannot parse URI as UTF-8.") from None
    if text.startswith(_SCHEME):
        _, slash, path = text[len(_SCHEME) :].partition("/")
        return slash + path
    return text if text.startswith("/") else ""


@functools.lru_cache(maxsize=256)
def parse_header(line: bytes) -> int | str:
    """Return the body's length in bytes for Content-Length, `EXPECT_CONTINUE`, or `OTHER`.

    The value of Last-Event-ID, which the reference's grammar does not know, is returned as text.

    :raises InvalidHeader: the line is no header, or its value makes the request one that cannot be served.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise InvalidHeader(f"Header contains invalid characters. Key: {_utf8_fault(error)}") from None
    name, colon, value = text.partition(":")
    if not colon:
        raise InvalidHeader(f"Header is incorrectly formatted. Key: {text}")
    match name.strip(_WHITE_SPACE).lower():
        case "content-length":
            return _content_length(name, value)
        case "expect" if value.strip(_WHITE_SPACE) == "100-continue":
            return EXPECT_CONTINUE
        case "last-event-id":
            return value.strip(_WHITE_SPACE)
        case "accept-encoding":
            _check_accept_encoding(value.strip(_WHITE_SPACE))
            return OTHER
        case _:
            return OTHER


def _content_length(name: str, value: str) -> int:
    digits = value.strip(_WHITE_SPACE).removeprefix("+")
    if digits.isascii() and digits.isdigit() and (length := int(digits)) <= _U32_MAX:
        return length
    raise _invalid_value(name, value)


def _check_accept_encoding(value: str) -> None:
    """Refuse a client that takes no plain answer; nothing else in the header matters."""
    if not value:
        raise InvalidRequest
    for encoding in value.split(","):
        match encoding.strip(_WHITE_SPACE):
            case "identity;q=0":
                raise _invalid_value("Accept-Encoding", encoding)
            case "*;q=0" if "identity" not in value:
                raise _invalid_value("Accept-Encoding", encoding)
            case _:
                pass


def _invalid_value(name: str, value: str) -> InvalidHeader:
    return InvalidHeader(f"Invalid value. Key:{name}; Value:{value}")


def _utf8_fault(error: UnicodeDecodeError) -> str:
    if error.reason == "unexpected end of data":
        return f"incomplete utf-8 byte sequence from index {error.start}"
    return f"invalid utf-8 sequence of {error.end - error.start} bytes from index {error.start}"
