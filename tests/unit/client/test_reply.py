import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudvmm.client.error import BadReply
from cloudvmm.client.reply import BODY_LIMIT_BYTES, HEAD_LIMIT_BYTES, Reply, ReplyParser

PONG = (
    b"HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
    b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
)
FULL = (
    b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
    b'{ "error": "Too many open connections" }'
)


def parse(raw):
    parser = ReplyParser()
    return parser.feed(raw) or parser.end()


@pytest.mark.parametrize(
    ("raw", "status", "body"),
    [
        (PONG, 200, b"{}"),
        (b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n", 204, b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1", 200, b"1"),
        (b"HTTP/1.0 404 Not Found\r\ncontent-length:3\r\n\r\nabc", 404, b"abc"),
        (FULL, 503, b'{ "error": "Too many open connections" }'),
        (b"HTTP/1.1 200 \r\n\r\n", 200, b""),
        (b"HTTP/1.1 200 \r\nConnection: close\r\n\r\nall that comes", 200, b"all that comes"),
        (b"HTTP/1.1 100 \r\n\r\nHTTP/1.1 100 Continue\r\nA: b\r\n\r\n" + PONG, 200, b"{}"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_reply_is_found_however_it_is_cut(raw, status, body, size):
    parser = ReplyParser()
    replies = [parser.feed(raw[start : start + size]) for start in range(0, len(raw), size)]
    reply = replies[-1] or parser.end()

    assert replies[:-1] == [None] * (len(replies) - 1)
    assert (reply.status, reply.body) == (status, body)
    assert not parser.has_more


def test_headers_have_lower_case_names():
    assert parse(PONG).headers["server"] == "Cloud Hypervisor API"


def test_bytes_that_nobody_asked_for_are_noticed():
    parser = ReplyParser()
    parser.feed(PONG + b"H")

    assert parser.has_more


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/2 200\r\n",
        b"HTTP/1.1 \r\n\r\n",
        b"HTTP/1.1 2000 \r\n\r\n",
        b"HTTP/1.1 099 \r\n\r\n",
        b"HTTP/1.1 2x0 \r\n\r\n",
        b"HTTP/1.1 \xb2\xb2\xb2 \r\n\r\n",
        b"HTTP/1.1 200 \r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 \r\n: nameless\r\n\r\n",
        b"HTTP/1.1 200 \r\n folded: line\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 0x10\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: \xb2\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: %d\r\n\r\n" % (BODY_LIMIT_BYTES + 1),
        b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 \r\n" + b"A: b\r\n" * HEAD_LIMIT_BYTES,
    ],
)
def test_what_is_not_a_response_is_refused(raw):
    with pytest.raises(BadReply):
        parse(raw)


@pytest.mark.parametrize("length", range(1, len(PONG)))
def test_response_that_breaks_off_is_refused(length):
    with pytest.raises(BadReply):
        parse(PONG[:length])


def test_close_before_any_byte_is_no_reply():
    assert ReplyParser().end() is None


def test_body_up_to_the_end_has_a_limit():
    parser = ReplyParser(body_limit_bytes=4)

    with pytest.raises(BadReply, match="longer than 4 bytes"):
        parser.feed(b"HTTP/1.1 200 \r\nConnection: close\r\n\r\n12345")


def test_stream_is_given_out_in_pieces():
    parser = ReplyParser()
    head = b"HTTP/1.1 200 \r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n"

    assert parser.feed(head + b"id: 1\n") is None
    assert parser.head is not None
    assert parser.head.is_stream
    assert parser.take() == b"id: 1\n"
    parser.feed(b"data: {}\n\n")
    assert parser.take() == b"data: {}\n\n"
    assert parser.take() == b""


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_refused(raw):
    try:
        reply = parse(raw)
    except BadReply:
        return
    assert reply is None or isinstance(reply, Reply)


@given(st.binary(max_size=60), st.integers(0, len(PONG)))
def test_damaged_response_is_a_reply_or_refused(damage, place):
    try:
        reply = parse(PONG[:place] + damage + PONG[place + len(damage) :])
    except BadReply:
        return
    assert 100 <= reply.status <= 999
