"""The bytes of responses."""

import pytest

from cloudvmm.wire.response import CONTINUE, STREAM_HEAD, refusal, response, server_full


def test_success_without_body_has_no_headers_about_one():
    assert response(204) == (
        b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
    )


def test_empty_200_says_that_it_is_empty():
    assert response(200) == (
        b"HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
        b"Content-Type: application/json\r\nContent-Length: 0\r\n\r\n"
    )


@pytest.mark.parametrize("status", [200, 400, 404, 409, 429, 500])
def test_body_follows_the_headers_in_their_order(status):
    assert response(status, b'["x"]') == (
        b"HTTP/1.1 %d \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
        b'Content-Type: application/json\r\nContent-Length: 5\r\n\r\n["x"]' % status
    )


def test_leave_to_send_the_body_is_the_library_s():
    assert CONTINUE == b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"


def test_refusal_is_the_library_s_and_not_json():
    assert refusal("Invalid request.", code="InvalidRequest") == (
        b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
        b"X-Cloudvmm-Error: InvalidRequest\r\n"
        b"Content-Type: application/json\r\nContent-Length: 81\r\n\r\n"
        b'{ "error": "Invalid request.\nAll previous unanswered requests will be dropped." }'
    )


def test_full_server_has_a_layout_of_its_own():
    assert server_full(code="TooManyConnections") == (
        b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\n"
        b"X-Cloudvmm-Error: TooManyConnections\r\nContent-Length: 40\r\n\r\n"
        b'{ "error": "Too many open connections" }'
    )


def test_code_of_an_error_stands_where_the_reference_s_library_puts_headers_of_others():
    assert response(404, b'["x"]', code="VmNotCreated") == (
        b"HTTP/1.1 404 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
        b"X-Cloudvmm-Error: VmNotCreated\r\n"
        b'Content-Type: application/json\r\nContent-Length: 5\r\n\r\n["x"]'
    )


def test_head_of_a_stream_announces_no_length_and_the_connection_s_end():
    assert STREAM_HEAD == (
        b"HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: close\r\n"
        b"Content-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n"
    )
