"""What goes over a server's connections is seen whoever the client is, and whatever is wrong with it."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys

import pytest

from cloudvmm.client import Client, ServerError
from support.peer import Peer, answering
from support.rest import RestClient, request_bytes
from support.server import Server
from support.tap import RECEIVED, SENT, check_all, note
from support.tapped import TappedSocket

DONE = b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
NEVER = b"HTTP/1.1 405 \r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]"
PING = b"HTTP/1.1 200 \r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
STREAM = b"HTTP/1.1 200 \r\nContent-Type: text/event-stream\r\n\r\n"
REMOTE = "import sys; from cloudvmm.cli.remote.main import main; sys.exit(main())"


@pytest.fixture
def noted(tmp_path):
    """`noted(answer, ...)`: one connection that was asked to pause and sent these."""

    def write(*answers):
        note(str(tmp_path / "0"), RECEIVED, request_bytes("PUT", "/api/v1/vm.pause") * len(answers))
        for answer in answers:
            note(str(tmp_path / "0"), SENT, answer)
        return tmp_path

    return write


def test_exchanges_of_the_document_pass(noted):
    assert check_all(noted(DONE, DONE)) == 2


@pytest.mark.parametrize("answers", [(NEVER,), (DONE, NEVER)])
def test_answer_outside_the_document_is_told(noted, answers):
    with pytest.raises(AssertionError, match="the document has 204, 400, 500, 503 alone"):
        check_all(noted(*answers))


def test_stream_ends_the_check_of_its_connection(noted):
    assert check_all(noted(DONE, STREAM, b"id: 1\n\n")) == 1


def test_note_that_was_cut_is_the_last(noted):
    folder = noted(DONE)
    with open(folder / "0", "ab") as file:
        file.write(SENT + b"\x01")
    assert check_all(folder) == 1


def test_raw_client_notices_at_once(tmp_path):
    path = str(tmp_path / "api")
    with (
        Peer(path, answering(NEVER)),
        RestClient(path) as client,
        pytest.raises(AssertionError, match="alone"),
    ):
        client.ask("PUT", "vm.pause")


def test_every_kind_of_client_is_seen(tmp_path):
    server = Server(tmp_path / "server", ["--engine", "fake"])
    try:
        server.wait_ready()
        before = check_all(server.traffic)
        with Client(server.socket_path) as client, pytest.raises(ServerError):
            client.vm_info()
        words = [sys.executable, "-c", REMOTE, "--api-socket", server.socket_path, "ping"]
        subprocess.run(words, check=True, timeout=20, stdout=subprocess.DEVNULL)
        assert check_all(server.traffic) == before + 2
    finally:
        server.check_end()


def test_connection_whose_note_is_lost_is_left_out_from_there_on(tmp_path):
    """Else the next answer would be taken for that to the last request."""
    ours, theirs = socket.socketpair()
    with theirs, TappedSocket(fileno=ours.detach()) as tapped:
        tapped.path = str(tmp_path / "0")
        theirs.sendall(request_bytes("PUT", "/api/v1/vm.boot"))
        tapped.recvmsg(65536)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            tapped.sendall(DONE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        theirs.sendall(request_bytes("GET", "/api/v1/vmm.ping"))
        tapped.recvmsg(65536)
        tapped.sendall(PING)
    assert check_all(tmp_path) == 0
