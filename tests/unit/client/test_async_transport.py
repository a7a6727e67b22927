"""The steps of `exchange.py`, awaited. What the steps are is tested in `test_transport.py`."""

import asyncio
import os
import socket
import threading

import pytest

from cloudvmm.client.async_transport import AsyncUnixTransport
from cloudvmm.client.error import BadReply, ConnectionFailed, NoAnswer
from support.deadline import HOST_S
from support.leak import Holdings
from support.peer import Peer, Talk, answering
from support.rest import same_file

DONE = b"HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n"
PONG = b"HTTP/1.1 200 \r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "api")


@pytest.fixture
def request_once(path):
    """`request_once("GET", ...)` on one transport, in one event loop."""
    before = Holdings()
    with asyncio.Runner() as runner:
        transport = AsyncUnixTransport(path, timeout_s=10)
        yield lambda *arguments, **options: runner.run(transport.request(*arguments, **options))
        transport.close()
    before.assert_nothing_added()


def test_requests_share_one_connection(path, request_once):
    with Peer(path, answering(PONG, DONE)):
        assert request_once("GET", "vmm.ping").body == b"{}"
        assert request_once("PUT", "vm.boot").status == 204


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_connection_that_the_server_closed_meanwhile_is_replaced(path, request_once, method):
    with Peer(path, answering(PONG), answering(PONG)) as peer:
        request_once("GET", "vmm.ping")
        peer.wait_played()
        assert request_once(method, "vm.boot").status == 200


def test_change_is_not_sent_twice(path, request_once):
    def script(talk: Talk):
        talk.read_request()
        talk.send(PONG)
        talk.read_request()

    with Peer(path, script):
        request_once("GET", "vmm.ping")
        with pytest.raises(NoAnswer, match="may or may not have run"):
            request_once("PUT", "vm.boot")


def test_no_server_means_that_nothing_has_run(request_once):
    with pytest.raises(ConnectionFailed) as caught:
        request_once("PUT", "vm.boot")

    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_server_with_a_full_queue_is_given_up_at_the_deadline(path, request_once):
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(ConnectionFailed) as caught:
            request_once("GET", "vmm.ping", timeout_s=0.05)

    assert isinstance(caught.value.__cause__, TimeoutError)
    assert str(caught.value.__cause__) == "timed out"


def test_silent_server_is_given_up_at_the_deadline(path, request_once):
    with (
        Peer(path, lambda talk: talk.read_request() and talk.wait_closed()),
        pytest.raises(NoAnswer) as caught,
    ):
        request_once("GET", "vmm.ping", timeout_s=0.05)

    assert isinstance(caught.value.__cause__, TimeoutError)


def test_large_body_waits_for_a_slow_reader(path, request_once):
    read_now = threading.Event()
    lengths = []

    def script(talk: Talk):
        assert read_now.wait(HOST_S)
        lengths.append(len(talk.read_request()))
        talk.send(DONE)

    body = b" " * (4 << 20)
    with Peer(path, script):
        timer = threading.Timer(0.02, read_now.set)
        timer.start()
        assert request_once("PUT", "vm.create", body).status == 204
        timer.join()

    assert lengths[0] > len(body)


def test_descriptors_travel_with_the_request_and_stay_ours(path, request_once, tmp_path):
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    same = []

    def script(talk: Talk):
        talk.read_request()
        same.extend(same_file(fd, received) for received in talk.fds)
        talk.send(DONE)

    with Peer(path, script):
        request_once("PUT", "vm.add-net", b"{}", [fd])

    assert same == [True]
    os.close(fd)


def test_garbage_ends_the_connection(path, request_once):
    with Peer(path, answering(b"garbage!"), answering(PONG)):
        with pytest.raises(BadReply):
            request_once("GET", "vmm.ping")
        assert request_once("GET", "vmm.ping").status == 200
