"""Bytes on the socket: rest.md section 2, and the library's own answers of section 4."""

import pytest

from support.rest import PING, RestClient, request_bytes


def library_400(text: str, code: str) -> bytes:
    body = f'{{ "error": "{text}\nAll previous unanswered requests will be dropped." }}'.encode()
    return (
        b"HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nX-Cloudvmm-Error: %s\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (code.encode(), len(body), body)
    )


REFUSED = [
    (
        b"POST /api/v1/vm.boot HTTP/1.1\r\n\r\n",
        "Invalid HTTP Method: Unsupported HTTP method.",
        "UnsupportedMethod",
    ),
    (
        b"HEAD /api/v1/vm.info HTTP/1.1\r\n\r\n",
        "Invalid HTTP Method: Unsupported HTTP method.",
        "UnsupportedMethod",
    ),
    (b"OPTIONS * HTTP/1.1\r\n\r\n", "Invalid HTTP Method: Unsupported HTTP method.", "UnsupportedMethod"),
    (
        b"put /api/v1/vm.boot HTTP/1.1\r\n\r\n",
        "Invalid HTTP Method: Unsupported HTTP method.",
        "UnsupportedMethod",
    ),
    (
        b"GET /api/v1/vm.info HTTP/2.0\r\n\r\n",
        "Invalid HTTP Version: Unsupported HTTP version.",
        "UnsupportedVersion",
    ),
    (b"GET  HTTP/1.1\r\n\r\n", "Invalid URI: Empty URI not allowed.", "InvalidUri"),
    (b"GET /\xff HTTP/1.1\r\n\r\n", "Invalid URI: Cannot parse URI as UTF-8.", "InvalidUri"),
    (b"hello\r\n", "Invalid request.", "InvalidRequest"),
    (b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\n\r\n", "Invalid request.", "InvalidRequest"),
    (
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "Invalid header. Reason: Invalid value. Key:Content-Length; Value: -1",
        "InvalidHeader",
    ),
    (
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4294967296\r\n\r\n",
        "Invalid header. Reason: Invalid value. Key:Content-Length; Value: 4294967296",
        "InvalidHeader",
    ),
    (
        b"GET /api/v1/vm.info HTTP/1.1\r\nAccept-Encoding: identity;q=0\r\n\r\n",
        "Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value:identity;q=0",
        "InvalidHeader",
    ),
    (
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4194305\r\nExpect: 100-continue\r\n\r\n",
        "Request payload with size 4194305 is larger than the limit of 4194304 allowed by server.",
        "PayloadTooLarge",
    ),
]


@pytest.mark.parametrize(("raw", "text", "code"), REFUSED)
def test_what_is_no_request_gets_the_library_s_400_and_the_connection_stays(client, raw, text, code):
    client.send(raw)
    assert client.reply().raw == library_400(text, code)
    assert client.ping().status == 200


def test_success_without_body_is_laid_out_exactly(client):
    assert client.ask("PUT", "vm.boot").raw == (
        b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
    )


def test_success_with_body_is_laid_out_exactly(client):
    body = b'{"build_version":"v54.0.0","version":"54.0.0","pid":7,"features":["io_uring","kvm"]}'
    assert client.ping().raw == (
        b"HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )


def test_http_1_0_is_answered_as_1_1_and_kept_open(client):
    client.send(b"GET /api/v1/vmm.ping HTTP/1.0\r\nConnection: close\r\n\r\n")
    assert client.reply().raw.startswith(b"HTTP/1.1 200 \r\n")
    assert client.ping().status == 200


def test_leave_to_send_the_body_comes_before_the_body_is_sent(client, vmm):
    body = b'{"desired_vcpus":2}'
    head = b"PUT /api/v1/vm.resize HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
    client.send(head % len(body))
    assert client.reply().raw == (
        b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
    )
    client.send(body)
    assert client.reply().status == 204
    assert vmm.await_request("vm.resize").data.desired_vcpus == 2


def test_pipelined_requests_are_answered_in_order(client):
    requests = [
        PING,
        request_bytes("PUT", "/api/v1/vm.boot"),
        request_bytes("PUT", "/api/v1/vm.resize", {}),
        request_bytes("PATCH", "/api/v1/vm.boot"),
        request_bytes("GET", "/nowhere"),
        PING,
    ]
    client.send(b"".join(requests))
    assert [client.reply().status for _ in requests] == [200, 204, 204, 400, 404, 200]
    assert client.is_quiet()


def test_refusal_drops_what_was_not_answered_yet(client, vmm):
    client.send(request_bytes("PUT", "/api/v1/vm.boot") + b"garbage\r\n")
    assert client.reply().raw == library_400("Invalid request.", "InvalidRequest")
    assert client.ping().status == 200
    assert vmm.names() == ["vmm.ping"]


def test_request_byte_by_byte_is_one_request(client, vmm):
    raw = request_bytes("PUT", "/api/v1/vm.remove-device", {"id": "disk"})
    for place in range(len(raw)):
        client.send(raw[place : place + 1])
    assert client.reply().status == 204
    assert vmm.await_request("vm.remove-device").data.id == "disk"


def test_content_type_and_accept_are_not_enforced(client):
    body = b'{"id":"d"}'
    client.send(
        b"PUT /api/v1/vm.remove-device HTTP/1.1\r\nContent-Type: text/html\r\nAccept: image/png\r\n"
        b"Transfer-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    assert client.reply().status == 204


def test_body_of_four_mebibytes_is_taken(client, vmm):
    body = b'{"id":"' + b"d" * ((4 << 20) - 9) + b'"}'
    assert client.ask("PUT", "vm.remove-device", body).status == 204
    assert len(vmm.await_request("vm.remove-device").data.id) == (4 << 20) - 9


def test_body_of_five_mebibytes_is_refused_once_and_the_connection_stays(client):
    client.send(request_bytes("PUT", "/api/v1/vm.create", b"x" * (5 << 20)))
    assert client.reply().raw == library_400(
        "Request payload with size 5242880 is larger than the limit of 4194304 allowed by server.",
        "PayloadTooLarge",
    )
    assert client.ping().status == 200
    assert client.is_quiet()


def test_half_a_request_keeps_nobody_waiting(client, server, socket_path):
    client.send(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    with RestClient(socket_path) as other:
        assert other.ping().status == 200


def test_client_that_ends_its_side_still_gets_its_answer(client):
    client.send(PING)
    client.socket.shutdown(1)
    assert client.reply().status == 200
    assert client.is_closed()
