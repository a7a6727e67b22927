"""Streams of bytes into requests."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudvmm.wire.http import BODY_LIMIT_BYTES, Continue, Refusal, Request, RequestParser
from cloudvmm.wire.response import refusal

PING = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n"
PING_REQUEST = Request("GET", "/api/v1/vmm.ping", None)


def put(body: bytes, *headers: bytes) -> bytes:
    head = [b"PUT /x HTTP/1.1", *headers, b"Content-Length: %d" % len(body)]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def refused(text: str, code: str) -> Refusal:
    return Refusal(refusal(text, code=code))


def test_request_without_headers_is_whole():
    assert RequestParser().feed(b"GET / HTTP/1.0\r\n\r\n") == [Request("GET", "/", None)]


def test_request_with_body_waits_for_all_of_it():
    parser = RequestParser()
    raw = put(b"0123456789")
    assert parser.feed(raw[:-1]) == []
    assert parser.feed(raw[-1:]) == [Request("PUT", "/x", b"0123456789")]


def test_body_of_length_zero_is_no_body():
    assert RequestParser().feed(put(b"")) == [Request("PUT", "/x", None)]


def test_last_content_length_counts():
    raw = b"PUT /x HTTP/1.1\r\nContent-Length: 9\r\nContent-Length: 2\r\n\r\nab"
    assert RequestParser().feed(raw) == [Request("PUT", "/x", b"ab")]


def test_reading_request_may_have_a_body():
    raw = b"GET /x HTTP/1.1\r\nContent-Length: 2\r\n\r\nab"
    assert RequestParser().feed(raw) == [Request("GET", "/x", b"ab")]


def test_chunked_body_is_not_decoded():
    raw = b"PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert RequestParser().feed(raw) == [refused("Invalid request.", "InvalidRequest")]


def test_pipelined_requests_come_in_order():
    assert RequestParser().feed(PING + put(b"ab") + PING) == [
        PING_REQUEST,
        Request("PUT", "/x", b"ab"),
        PING_REQUEST,
    ]


def test_client_that_asks_for_leave_gets_it_before_its_body_is_read():
    parser = RequestParser()
    head = b"PUT /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    assert parser.feed(head) == [Continue()]
    assert parser.feed(b"ab") == [Request("PUT", "/x", b"ab")]


def test_leave_is_not_given_where_there_is_no_body():
    raw = b"PUT /x HTTP/1.1\r\nExpect: 100-continue\r\n\r\n"
    assert RequestParser().feed(raw) == [Request("PUT", "/x", None)]


def test_leave_does_not_carry_over_to_the_next_request():
    events = RequestParser().feed(put(b"a", b"Expect: 100-continue") + put(b"b"))
    assert events == [Continue(), Request("PUT", "/x", b"a"), Request("PUT", "/x", b"b")]


@pytest.mark.parametrize("length", [1022, 100])
def test_line_that_fits_1024_bytes_is_read(length):
    target = b"/" + b"a" * (length - len(b"GET / HTTP/1.1"))
    events = RequestParser().feed(b"GET " + target + b" HTTP/1.1\r\n\r\n")
    assert events == [Request("GET", target.decode(), None)]


def test_longer_request_line_is_refused():
    target = b"/" + b"a" * (1023 - len(b"GET / HTTP/1.1"))
    events = RequestParser().feed(b"GET " + target + b" HTTP/1.1\r\n\r\n")
    assert events == [refused("Invalid request.", "InvalidRequest")]


def test_longer_header_is_refused_with_its_start():
    header = b"X: " + b"a" * 1020
    events = RequestParser().feed(b"GET / HTTP/1.1\r\n" + header + b"\r\n\r\n")
    start = (header + b"\r")[:1024].decode()
    assert events == [
        refused(f"Invalid header. Reason: Invalid content length. Header: {start}", "InvalidHeader")
    ]


def test_any_number_of_headers_is_read():
    raw = b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n"
    assert RequestParser().feed(raw) == [Request("GET", "/", None)]


def test_body_at_the_limit_is_read():
    body = b"x" * BODY_LIMIT_BYTES
    assert RequestParser().feed(put(body)) == [Request("PUT", "/x", body)]


def test_body_above_the_limit_is_refused_once_and_read_past():
    parser = RequestParser()
    raw = put(b"x" * (BODY_LIMIT_BYTES + 1))
    pieces = [raw[start : start + 65536] for start in range(0, len(raw), 65536)]
    events = [event for piece in pieces for event in parser.feed(piece)]
    assert events == [
        refused(
            "Request payload with size 4194305 is larger than the limit of 4194304 allowed by server.",
            "PayloadTooLarge",
        )
    ]
    assert parser.feed(PING) == [PING_REQUEST]


def test_client_refused_leave_to_send_does_not_have_its_next_request_swallowed():
    parser = RequestParser()
    head = b"PUT /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5000000\r\n\r\n"
    assert [type(event) for event in parser.feed(head)] == [Refusal]
    assert parser.feed(PING) == [PING_REQUEST]


@pytest.mark.parametrize(
    "bad",
    [
        b"POST /x HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody",
        b"PUT /x HTTP/9\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody",
        b"PUT /x HTTP/1.1\r\nContent-Length: 4\r\nAccept-Encoding: *;q=0\r\n\r\nbody",
        b"PUT /x HTTP/1.1\r\nbroken\r\nContent-Length: 4\r\n\r\nbody",
    ],
)
def test_refused_request_is_refused_once_and_the_next_is_read(bad):
    parser = RequestParser()
    head, body = bad[:-4], bad[-4:]
    assert [type(event) for event in parser.feed(head)] == [Refusal]
    assert parser.feed(body) == []
    assert parser.feed(PING) == [PING_REQUEST]


@pytest.mark.parametrize(
    "garbage",
    [b"garbage\r\n", b"\r\n", b"\x00\xff\r\n", b"a" * 1024, b"PUT /x HTTP/1.1\r\nContent-Length: x\r\n\r\n"],
)
def test_request_after_garbage_is_read(garbage):
    parser = RequestParser()
    assert [type(event) for event in parser.feed(garbage)] == [Refusal]
    assert parser.feed(PING) == [PING_REQUEST]


def test_refusal_takes_the_unanswered_requests_of_its_piece_with_it():
    events = RequestParser().feed(PING + put(b"a", b"Expect: 100-continue") + b"garbage\r\n" + PING)
    assert events == [Continue(), refused("Invalid request.", "InvalidRequest")]


REQUESTS = st.lists(
    st.one_of(
        st.just(PING),
        st.builds(put, st.binary(max_size=3000)),
        st.builds(put, st.binary(min_size=1, max_size=50), st.just(b"Expect: 100-continue")),
        st.builds(put, st.binary(max_size=50), st.builds(lambda n: b"X: " + b"y" * n, st.integers(0, 1000))),
    ),
    max_size=6,
).map(b"".join)


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(stream) + 1) for place in places}), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges) if a < b]


@given(stream=REQUESTS, places=st.lists(st.integers(0, 100_000), max_size=20))
def test_how_a_stream_is_cut_makes_no_difference(stream, places):
    whole, parser = RequestParser().feed(stream), RequestParser()
    assert [event for piece in cut(stream, places) for event in parser.feed(piece)] == whole


@given(stream=REQUESTS)
def test_bytes_one_by_one_make_the_same_requests(stream):
    parser = RequestParser()
    events = [event for place in range(len(stream)) for event in parser.feed(stream[place : place + 1])]
    assert events == RequestParser().feed(stream)


LINES = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from(
            [b"\r\n", b"\r\n\r\n", b"PUT / HTTP/1.1", b"Content-Length: 3", b"Expect: 100-continue"]
        ),
        st.builds(lambda n: b"Content-Length: %d" % n, st.integers(0, 2**33)),
        st.builds(lambda n: b"a" * n, st.integers(1000, 1100)),
    ),
    max_size=12,
)


@given(pieces=LINES)
def test_garbage_never_raises_and_at_most_one_refusal_comes_of_a_piece(pieces):
    parser = RequestParser()
    for piece in pieces:
        events = parser.feed(piece)
        assert sum(isinstance(event, Refusal) for event in events) <= 1
        assert all(isinstance(event, Request | Continue | Refusal) for event in events)


@given(garbage=LINES.map(b"\r\n".join), places=st.lists(st.integers(0, 100_000), max_size=5))
def test_state_after_garbage_is_bounded(garbage, places):
    parser = RequestParser()
    for piece in cut(garbage, places):
        parser.feed(piece)
    assert len(parser._left) < 1024


def test_requests_that_come_again_mean_the_same_and_few_of_them_are_kept():
    requests = [
        b"PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        for body in (b"x" * size for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 5000))
    ]
    parser = RequestParser()
    for _ in range(3):
        for raw in (*requests, requests[0], requests[1]):
            assert parser.feed(raw) == RequestParser().feed(raw)
    assert len(parser._known) == 8
    assert all(len(raw) < 2048 for raw in parser._known)
