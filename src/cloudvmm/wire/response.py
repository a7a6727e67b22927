"""The bytes of an HTTP response, in the one layout that clients of the reference have ever seen.

The status line has no reason phrase; the order of the headers is fixed; 204 and 100 have no body and no
headers about one.
"""

from __future__ import annotations

from typing import Final

_API_SERVER: Final = b"Cloud Hypervisor API"
_LIBRARY_SERVER: Final = b"Firecracker API"
_BODILESS: Final = frozenset((100, 204))
STATUSES: Final = (200, 204, 400, 404, 409, 429, 500)


def _head(status: int, server: bytes) -> bytes:
    head = b"HTTP/1.1 %d \r\nServer: %s\r\nConnection: keep-alive\r\n" % (status, server)
    if status in _BODILESS:
        return head + b"\r\n"
    return head + b"Content-Type: application/json\r\nContent-Length: "


_HEADS: Final = {status: _head(status, _API_SERVER) for status in STATUSES}
_REFUSAL_HEAD: Final = _head(400, _LIBRARY_SERVER)

CONTINUE: Final = _head(100, _LIBRARY_SERVER)

_FULL_BODY: Final = b'{ "error": "Too many open connections" }'
# Not laid out like the others: the reference sends these bytes past its own response writer.
SERVER_FULL: Final = (
    b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_FULL_BODY), _FULL_BODY)
)


def response(status: int, body: bytes = b"") -> bytes:
    """Lay out an answer of the API. `status` is one of `STATUSES`; `body` is JSON, or empty."""
    if status in _BODILESS:
        return _HEADS[status]
    return b"%s%d\r\n\r\n%s" % (_HEADS[status], len(body), body)


def refusal(text: str) -> bytes:
    """Lay out the 400 for bytes that are not a request. Its body only looks like JSON; that is how it is."""
    body = b'{ "error": "%s\nAll previous unanswered requests will be dropped." }' % text.encode()
    return b"%s%d\r\n\r\n%s" % (_REFUSAL_HEAD, len(body), body)
