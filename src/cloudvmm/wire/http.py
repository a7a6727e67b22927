"""A stream of bytes into HTTP requests, and the answers that the grammar itself gives.

No I/O: whoever owns the socket feeds what it received and gets events back. How the stream was cut into
pieces makes no difference to the requests found in it. Only a refusal depends on the pieces, as it does
in the reference: it takes with it the requests that came in the same piece and are not answered yet, and
the rest of the piece. The stream goes on behind the refused request's body where its length is known, so
that a client which sends one request that cannot be served gets one refusal.
"""

from __future__ import annotations

from cloudvmm.errors import error_code
from cloudvmm.value import Value
from cloudvmm.wire.line import (
    EXPECT_CONTINUE,
    InvalidHeader,
    InvalidRequest,
    parse_header,
    parse_request_line,
)
from cloudvmm.wire.response import CONTINUE, refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

LINE_LIMIT_BYTES: Final = 1024
BODY_LIMIT_BYTES: Final = 4 << 20

_CRLF: Final = b"\r\n"
_MOST_KNOWN: Final = 8  # requests of one client that it may send again
_KNOWN_BYTES: Final = 2048

# What the next bytes belong to. Plain numbers: compared several times per request.
_REQUEST_LINE: Final = 0
_HEADERS: Final = 1
_BODY: Final = 2


class Request(Value):
    """`body` is None where the client announced none, or one of length 0."""

    __slots__ = ("method", "path", "body", "last_event_id")  # noqa: RUF023

    def __init__(self, method: str, path: str, body: bytes | None, last_event_id: str = "") -> None:
        self.method = method
        self.path = path
        self.body = body
        self.last_event_id = last_event_id


class Continue(Value):
    """The client waits for leave to send its body: send `raw`."""

    __slots__ = ("raw",)

    def __init__(self) -> None:
        self.raw = CONTINUE


class Refusal(Value):
    """The client sent what is not a request: send `raw`, forget what came with the request so far."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        self.raw = raw


Event = Request | Continue | Refusal


class PayloadTooLarge(InvalidRequest):
    """The body is longer than the server takes."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"Request payload with size {size_bytes} is larger than the limit of {limit_bytes} "
            "allowed by server."
        )


class RequestParser:
    """The state of one connection's stream. Never raises on what a client sends."""

    __slots__ = (
        "_body",
        "_body_limit",
        "_expects",
        "_known",
        "_last_event_id",
        "_left",
        "_length",
        "_line",
        "_missing",
        "_position",
        "_skip",
        "_stage",
    )

    def __init__(self, *, body_limit_bytes: int = BODY_LIMIT_BYTES) -> None:
        self._body_limit = body_limit_bytes
        self._known: dict[bytes, list[Event]] = {}
        self._left = b""  # the start of a line whose end has not come
        self._skip = 0  # bytes of a refused request's body still to come
        self._position = 0  # where in the piece the line being read starts
        self._start_request()

    def feed(self, piece: bytes) -> list[Event]:
        """Take the next bytes of the stream; return what they complete, in order."""
        if not self.is_between_requests:
            return self._feed(piece)
        known = self._known.get(piece)
        if known is not None:
            return known
        events = self._feed(piece)
        # A client sends the same few requests again and again: what they mean is kept.
        is_whole = len(events) == 1 and type(events[0]) is Request and self.is_between_requests
        if is_whole and len(piece) <= _KNOWN_BYTES:
            if len(self._known) == _MOST_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[piece] = events
        return events

    @property
    def is_between_requests(self) -> bool:
        """Whether nothing has come of the next request."""
        return not (self._stage or self._left or self._skip)

    def _feed(self, piece: bytes) -> list[Event]:
        if self._skip:
            skipped = min(self._skip, len(piece))
            self._skip -= skipped
            piece = piece[skipped:]
        if self._left:
            piece, self._left = self._left + piece, b""
        events: list[Event] = []
        try:
            self._parse(piece, events)
        except InvalidRequest as error:
            events = [event for event in events if type(event) is Continue]
            events.append(Refusal(refusal(str(error), code=error_code(error))))
            self._skip = self._unread_body(piece)
            self._start_request()
        return events

    def _start_request(self) -> None:
        self._stage: int = _REQUEST_LINE
        self._line = ("", "")
        self._length = 0
        self._expects = False
        self._last_event_id = ""
        self._body: list[bytes] = []
        self._missing = 0

    def _parse(self, piece: bytes, events: list[Event]) -> None:
        self._position = 0
        while True:
            if self._stage is _BODY:
                self._take_body(piece)
                if self._missing:
                    return
                self._finish(events)
                continue
            start = self._position
            end = piece.find(_CRLF, start, start + LINE_LIMIT_BYTES)
            if end < 0:
                self._keep_line(piece)
                return
            self._take_line(piece[start:end], events)
            # Moved only now: after an error it still tells which line is at fault.
            self._position = end + len(_CRLF)

    def _take_line(self, line: bytes, events: list[Event]) -> None:
        if self._stage is _REQUEST_LINE:
            self._line = parse_request_line(line)
            self._stage = _HEADERS
        elif line:
            self._note(parse_header(line))
        else:
            self._end_head(events)

    def _note(self, header: int | str) -> None:
        if isinstance(header, str):
            self._last_event_id = header
        elif header >= 0:
            self._length = header
        elif header == EXPECT_CONTINUE:
            self._expects = True

    def _end_head(self, events: list[Event]) -> None:
        if not self._length:
            self._finish(events)
            return
        if self._length > self._body_limit:
            raise PayloadTooLarge(self._length, self._body_limit)
        if self._expects:
            events.append(Continue())
        self._missing = self._length
        self._stage = _BODY

    def _take_body(self, piece: bytes) -> None:
        chunk = piece[self._position : self._position + self._missing]
        self._body.append(chunk)
        self._position += len(chunk)
        self._missing -= len(chunk)

    def _finish(self, events: list[Event]) -> None:
        method, path = self._line
        body = b"".join(self._body) if self._length else None
        events.append(Request(method, path, body, self._last_event_id))
        self._start_request()

    def _keep_line(self, piece: bytes) -> None:
        left = piece[self._position :]
        if len(left) < LINE_LIMIT_BYTES:
            self._left = left
            return
        if self._stage is _REQUEST_LINE:
            raise InvalidRequest
        start = left[:LINE_LIMIT_BYTES].decode(errors="replace")
        raise InvalidHeader(f"Invalid content length. Header: {start}")

    def _unread_body(self, piece: bytes) -> int:
        """Return how many bytes of the refused request's body come after `piece`.

        A client that asked for leave to send its body has been told no, so it will not send it.
        """
        body_start = self._head_end(piece)
        if body_start is None or self._expects:
            return 0
        return max(0, self._length - (len(piece) - body_start))

    def _head_end(self, piece: bytes) -> int | None:
        """Read on to the end of the refused request's head, for its length; None if it is not in `piece`."""
        if self._stage is _HEADERS and piece.startswith(_CRLF, self._position):
            return self._position + len(_CRLF)
        end = piece.find(_CRLF * 2, self._position)
        if end < 0:
            return None
        for line in piece[self._position : end].split(_CRLF):
            try:
                self._note(parse_header(line))
            except InvalidRequest:
                continue
        return end + 2 * len(_CRLF)
