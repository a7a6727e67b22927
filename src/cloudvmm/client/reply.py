"""The bytes of HTTP responses into replies. No I/O: whoever owns the socket feeds what it received.

Wider than what our own server sends: Cloud Hypervisor gives no reason phrase, other servers give one; a
response of status 200 may have no length, which then means no body, unless it says that the connection ends
with it. Responses of 1xx are passed over. Chunked bodies are refused: none of these servers sends them.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.client.error import BadReply

HEAD_LIMIT_BYTES: Final = 64 << 10
BODY_LIMIT_BYTES: Final = 64 << 20

EVENT_STREAM: Final = "text/event-stream"

_END_OF_HEAD: Final = b"\r\n\r\n"
_VERSIONS: Final = (b"HTTP/1.1", b"HTTP/1.0")
_NO_BODY: Final = (204, 304)


class Reply:
    """`headers` has lower-case names; of a header that came twice it has the last value."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.status = status
        self.headers = headers
        self.body = body

    def __repr__(self) -> str:
        return f"Reply({self.status}, {self.body[:80]!r})"

    @property
    def is_stream(self) -> bool:
        """Whether the body comes in pieces for as long as the connection lives."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower() == EVENT_STREAM

    @property
    def ends_connection(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"


class ReplyParser:
    """One response. `head` is there, without a body, as soon as it is complete.

    A stream's body is not collected: `take` gives what has come of it.
    """

    def __init__(self, *, body_limit_bytes: int = BODY_LIMIT_BYTES) -> None:
        self.head: Reply | None = None
        self._limit = body_limit_bytes
        self._received = bytearray()
        self._length: int | None = None  # of the body; None where only the connection's end tells

    @property
    def has_more(self) -> bool:
        """Whether bytes are left that no request asked for."""
        return bool(self._received)

    def feed(self, piece: bytes) -> Reply | None:
        """Take the next bytes; return the reply once it is complete. A stream never is.

        :raises BadReply: this is not an HTTP response, or one beyond all limits.
        """
        self._received += piece
        while self.head is None:
            if not self._take_head():
                return None
        if self.head.is_stream:
            return None
        if self._length is None:
            if len(self._received) > self._limit:
                raise BadReply(f"The body is longer than {self._limit} bytes")
            return None
        if len(self._received) < self._length:
            return None
        return self._finish(self.head, self._length)

    def end(self) -> Reply | None:
        """The server has closed: return the reply if that completes it, None if nothing had come.

        :raises BadReply: it has closed in the middle of a response.
        """
        if self.head is None and not self._received:
            return None
        if self.head is None or self._length is not None:
            raise BadReply("The server closed the connection in the middle of its answer")
        return self._finish(self.head, len(self._received))

    def take(self) -> bytes:
        """Return the bytes of a stream's body that have come since the last call."""
        piece = bytes(self._received)
        self._received.clear()
        return piece

    def _finish(self, head: Reply, length: int) -> Reply:
        body = bytes(self._received[:length])
        del self._received[:length]
        return Reply(head.status, head.headers, body)

    def _take_head(self) -> bool:
        """Take one head out of what was received; one of 1xx leaves no trace."""
        end = self._received.find(_END_OF_HEAD, 0, HEAD_LIMIT_BYTES)
        if end < 0:
            if len(self._received) >= HEAD_LIMIT_BYTES:
                raise BadReply(f"The head is longer than {HEAD_LIMIT_BYTES} bytes")
            _check_start(self._received)
            return False
        head = parse_head(bytes(self._received[:end]))
        del self._received[: end + len(_END_OF_HEAD)]
        if head.status >= 200:
            self.head = head
            self._length = self._body_length(head)
        return True

    def _body_length(self, head: Reply) -> int | None:
        if "transfer-encoding" in head.headers:
            raise BadReply(f"The body is encoded: {head.headers['transfer-encoding']}")
        if head.status in _NO_BODY:
            return 0
        length = head.headers.get("content-length")
        if length is None:
            return None if head.is_stream or head.ends_connection else 0
        if not (length.isascii() and length.isdigit() and len(length) <= 20):
            raise BadReply(f"The body's length is not a number: {length}")
        if int(length) > self._limit:
            raise BadReply(f"The body is longer than {self._limit} bytes")
        return int(length)


def parse_head(head: bytes) -> Reply:
    """Parse a status line and headers, without the empty line.

    :raises BadReply: this is not the head of an HTTP response.
    """
    status_line, *lines = head.split(b"\r\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or name != name.strip():
            raise BadReply(f"This is not a header: {_shown(line)}")
        headers[name.decode("latin-1").lower()] = value.decode("latin-1").strip()
    return Reply(_status(status_line), headers)


def _status(line: bytes) -> int:
    version, _, rest = line.partition(b" ")
    code = rest.partition(b" ")[0]
    if version not in _VERSIONS or len(code) != 3 or not code.isdigit() or code < b"100":
        raise BadReply(f"This is not an HTTP status line: {_shown(line)}")
    return int(code)


def _check_start(received: bytearray) -> None:
    """Give up early on a peer that speaks something else, instead of waiting for the end of its head."""
    start = bytes(received[:7])
    if not b"HTTP/1."[: len(start)] == start:
        raise BadReply(f"The server does not speak HTTP: {_shown(bytes(received))}")


def _shown(text: bytes, limit: int = 80) -> str:
    return repr(text[:limit])[1:]
