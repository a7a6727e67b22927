"""The request line and the header lines, one table each."""

import pytest

from cloudvmm.wire.line import (
    EXPECT_CONTINUE,
    OTHER,
    InvalidHeader,
    InvalidRequest,
    parse_header,
    parse_request_line,
)


@pytest.mark.parametrize(
    ("line", "method", "path"),
    [
        (b"GET /api/v1/vm.info HTTP/1.1", "GET", "/api/v1/vm.info"),
        (b"PUT /api/v1/vm.boot HTTP/1.0", "PUT", "/api/v1/vm.boot"),
        (b"PATCH / HTTP/1.1", "PATCH", "/"),
        (b"DELETE /x HTTP/1.1", "DELETE", "/x"),
        (b"GET http://localhost/api/v1/vm.info HTTP/1.1", "GET", "/api/v1/vm.info"),
        (b"GET http://localhost:80/a HTTP/1.1", "GET", "/a"),
        (b"GET http:///a HTTP/1.1", "GET", "/a"),
        (b"GET http://localhost HTTP/1.1", "GET", ""),
        (b"GET http:// HTTP/1.1", "GET", ""),
        (b"GET HTTP://localhost/a HTTP/1.1", "GET", ""),
        (b"GET https://localhost/a HTTP/1.1", "GET", ""),
        (b"GET * HTTP/1.1", "GET", ""),
        (b"GET vm.info HTTP/1.1", "GET", ""),
        (b"GET /a?b=1#c HTTP/1.1", "GET", "/a?b=1#c"),
        (b"GET /%61 HTTP/1.1", "GET", "/%61"),
        ("GET /ü HTTP/1.1".encode(), "GET", "/ü"),
    ],
)
def test_request_line_is_read(line, method, path):
    assert parse_request_line(line) == (method, path)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"", "Invalid request."),
        (b"GET", "Invalid request."),
        (b"GET /", "Invalid request."),
        (b"POST /", "Invalid request."),
        (b"POST / HTTP/1.1", "Invalid HTTP Method: Unsupported HTTP method."),
        (b"HEAD / HTTP/1.1", "Invalid HTTP Method: Unsupported HTTP method."),
        (b"OPTIONS / HTTP/1.1", "Invalid HTTP Method: Unsupported HTTP method."),
        (b"get / HTTP/1.1", "Invalid HTTP Method: Unsupported HTTP method."),
        (b" GET / HTTP/1.1", "Invalid HTTP Method: Unsupported HTTP method."),
        (b"GET  HTTP/1.1", "Invalid URI: Empty URI not allowed."),
        (b"GET  / HTTP/1.1", "Invalid URI: Empty URI not allowed."),
        (b"GET /\xff HTTP/1.1", "Invalid URI: Cannot parse URI as UTF-8."),
        (b"GET / HTTP/2", "Invalid HTTP Version: Unsupported HTTP version."),
        (b"GET / HTTP/0.9", "Invalid HTTP Version: Unsupported HTTP version."),
        (b"GET / http/1.1", "Invalid HTTP Version: Unsupported HTTP version."),
        (b"GET / HTTP/1.1 ", "Invalid HTTP Version: Unsupported HTTP version."),
        (b"GET / HTTP/1.1\nHost: x", "Invalid HTTP Version: Unsupported HTTP version."),
    ],
)
def test_bad_request_line_is_refused_with_the_library_s_words(line, text):
    with pytest.raises(InvalidRequest) as refused:
        parse_request_line(line)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        (b"Content-Length: 12", 12),
        (b"content-length:12", 12),
        (b"CONTENT-LENGTH:\t 12 ", 12),
        (b" Content-Length : +0012", 12),
        (b"Content-Length: 0", 0),
        (b"Content-Length: 4294967295", 4294967295),
        (b"Expect: 100-continue", EXPECT_CONTINUE),
        (b"EXPECT:100-continue", EXPECT_CONTINUE),
        (b"Expect: 100-Continue", OTHER),
        (b"Expect: 103-checkpoint", OTHER),
        (b"Host: localhost", OTHER),
        (b"X-Any: a: b: c", OTHER),
        (b": no name", OTHER),
        (b"Content-Type: text/html", OTHER),
        (b"Content-Type:", OTHER),
        (b"Accept: image/png", OTHER),
        (b"Transfer-Encoding: chunked", OTHER),
        (b"Transfer-Encoding: gzip", OTHER),
        (b"Accept-Encoding: gzip, deflate", OTHER),
        (b"Accept-Encoding: identity", OTHER),
        (b"Accept-Encoding: identity;q=0.5", OTHER),
        (b"Accept-Encoding: identity; q=0", OTHER),
        (b"Accept-Encoding: *;q=0, identity;q=1", OTHER),
    ],
)
def test_header_is_read(line, meaning):
    assert parse_header(line) == meaning


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"Content-Length: x", "Invalid header. Reason: Invalid value. Key:Content-Length; Value: x"),
        (b"content-length:", "Invalid header. Reason: Invalid value. Key:content-length; Value:"),
        (b"Content-Length: -1", "Invalid header. Reason: Invalid value. Key:Content-Length; Value: -1"),
        (b"Content-Length: ++1", "Invalid header. Reason: Invalid value. Key:Content-Length; Value: ++1"),
        (b"Content-Length: 1_0", "Invalid header. Reason: Invalid value. Key:Content-Length; Value: 1_0"),
        (
            "Content-Length: ٣".encode(),
            "Invalid header. Reason: Invalid value. Key:Content-Length; Value: ٣",
        ),
        (
            b"Content-Length: 4294967296",
            "Invalid header. Reason: Invalid value. Key:Content-Length; Value: 4294967296",
        ),
        (
            b"Accept-Encoding: gzip, identity;q=0",
            "Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value: identity;q=0",
        ),
        (
            b"Accept-Encoding: *;q=0",
            "Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value:*;q=0",
        ),
        (b"NoColon", "Invalid header. Reason: Header is incorrectly formatted. Key: NoColon"),
        (
            b"Host: \xff",
            "Invalid header. Reason: Header contains invalid characters. "
            "Key: invalid utf-8 sequence of 1 bytes from index 6",
        ),
        (
            b"Host: \xe2\x82",
            "Invalid header. Reason: Header contains invalid characters. "
            "Key: incomplete utf-8 byte sequence from index 6",
        ),
    ],
)
def test_bad_header_is_refused_with_the_library_s_words(line, text):
    with pytest.raises(InvalidHeader) as refused:
        parse_header(line)
    assert str(refused.value) == text


def test_empty_accept_encoding_is_refused():
    with pytest.raises(InvalidRequest) as refused:
        parse_header(b"Accept-Encoding: ")
    assert str(refused.value) == "Invalid request."
