"""The bytes of an HTTP response, in the one layout that clients of the reference have ever seen.

The status line has no reason phrase; the order of the headers is fixed; 204 and 100 have no body and no
headers about one. An error has one header more than the reference's, for programs: `ERROR_HEADER`, with a
name from docs/errors.md. It stands where the reference's HTTP library writes headers that it does not know
itself, between Connection and Content-Type.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

ERROR_HEADER: Final = "X-Cloudvmm-Error"

_API_SERVER: Final = b"Cloud Hypervisor API"
_LIBRARY_SERVER: Final = b"Firecracker API"
_BODILESS: Final = frozenset((100, 204))
STATUSES: Final = (200, 204, 400, 404, 409, 429, 500, 503)


def _head(status: int, server: bytes, code: str = "") -> bytes:
    head = b"HTTP/1.1 %d \r\nServer: %s\r\nConnection: keep-alive\r\n%s" % (
        status,
        server,
        _error_header(code),
    )
    if status in _BODILESS:
        return head + b"\r\n"
    return head + b"Content-Type: application/json\r\nContent-Length: "


def _error_header(code: str) -> bytes:
    return f"{ERROR_HEADER}: {code}\r\n".encode("ascii") if code else b""


_HEADS: Final = {status: _head(status, _API_SERVER) for status in STATUSES}

CONTINUE: Final = _head(100, _LIBRARY_SERVER)

# An answer that ends with the connection, so it needs neither a length nor chunks.
STREAM_HEAD: Final = (
    b"HTTP/1.1 200 \r\nServer: %s\r\nConnection: close\r\n"
    b"Content-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n" % _API_SERVER
)

_FULL_BODY: Final = b'{ "error": "Too many open connections" }'
_NOT_ADMITTED_BODY: Final = b'{ "error": "This user may not use the API" }'


def response(status: int, body: bytes = b"", *, code: str = "") -> bytes:
    """Lay out an answer of the API. `status` is one of `STATUSES`; `body` is JSON, or empty.

    `code` is that of an error; a success has none.
    """
    if status in _BODILESS:
        return _HEADS[status]
    head = _head(status, _API_SERVER, code) if code else _HEADS[status]
    return b"%s%d\r\n\r\n%s" % (head, len(body), body)


def refusal(text: str, *, code: str) -> bytes:
    """Lay out the 400 for bytes that are not a request. Its body only looks like JSON; that is how it is."""
    body = b'{ "error": "%s\nAll previous unanswered requests will be dropped." }' % text.encode()
    return b"%s%d\r\n\r\n%s" % (_head(400, _LIBRARY_SERVER, code), len(body), body)


def server_full(*, code: str) -> bytes:
    """Lay out the 503 for a connection too many.

    Not laid out like the others: the reference sends these bytes past its own response writer.
    """
    return _turned_away(503, _FULL_BODY, code)


def not_admitted(*, code: str) -> bytes:
    """Lay out the 403 for a connection of somebody who may have none; as `server_full`."""
    return _turned_away(403, _NOT_ADMITTED_BODY, code)


def _turned_away(status: int, body: bytes, code: str) -> bytes:
    return b"HTTP/1.1 %d\r\nServer: %s\r\nConnection: close\r\n%sContent-Length: %d\r\n\r\n%s" % (
        status,
        _LIBRARY_SERVER,
        _error_header(code),
        len(body),
        body,
    )
