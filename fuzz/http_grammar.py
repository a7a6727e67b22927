"""Fuzz the HTTP grammar: `wire.http.RequestParser` on any bytes, cut in any way.

What must hold: nothing is raised; a piece yields at most one refusal, as its last event; each event's bytes
are a whole response; the parser keeps less than a line between pieces; a stream without a refusal yields
the same requests however it is cut; and the document has the answer to each request, and each refusal.
"""

from __future__ import annotations

import re
from collections.abc import Hashable

from answered import check_answered, check_response
from cloudvmm.wire.http import LINE_LIMIT_BYTES, Continue, Event, Refusal, Request, RequestParser
from named import cut
from runner import Target, main

WORDS = (
    b"GET ", b"PUT ", b"PATCH ", b"DELETE ", b"POST ", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"\r\n\r\n",
    b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Host: x\r\n",
    b"Accept-Encoding: ", b"identity;q=0", b"gzip", b"*;q=0", b"Content-Type: application/json\r\n",
    b"http://host/", b"4194304", b"4194305", b"a" * 1100, b"Connection: close\r\n", b"/api/v1/vmm.ping",
)  # fmt: skip


def check(stream: bytes) -> Hashable:
    """:raises Exception: a promise is broken."""
    whole = feed_all([stream])
    pieces = feed_all(cut(stream))
    if not any(isinstance(event, Refusal) for event in whole):
        assert pieces == whole, "the cuts changed the requests"
    return tuple(describe(event) for event in whole[:6])


def feed_all(pieces: list[bytes]) -> list[Event]:
    parser = RequestParser()
    events: list[Event] = []
    for piece in pieces:
        found = parser.feed(piece)
        assert len(parser._left) < LINE_LIMIT_BYTES, "more than a line is kept"
        assert not any(isinstance(event, Refusal) for event in found[:-1]), "something follows a refusal"
        events += found
    for event in events:
        check_event(event)
    return events


def check_event(event: Event) -> None:
    if isinstance(event, Request):
        assert event.method in ("GET", "PUT", "PATCH", "DELETE")
        assert event.path == "" or event.path.startswith("/")
        assert event.body is None or event.body
        check_answered(event)
        return
    head, _, body = event.raw.partition(b"\r\n\r\n")
    if isinstance(event, Continue):
        assert (head[:13], body) == (b"HTTP/1.1 100 ", b"")
    else:
        assert head.startswith(b"HTTP/1.1 400 \r\n")
        assert head.endswith(b"Content-Length: %d" % len(body))
        check_response(event.raw)


def describe(event: Event) -> Hashable:
    if isinstance(event, Request):
        return event.method, re.sub(r"\w+", "x", event.path)[:8], event.body is None
    if isinstance(event, Continue):
        return "continue"
    return event.raw.partition(b"error")[2][:48].partition(b"Key")[0]  # no further: the client's words follow


TARGET = Target("http_grammar", check, words=WORDS)

if __name__ == "__main__":
    main(TARGET)
