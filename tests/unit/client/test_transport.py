import os
import socket
import subprocess
import sys
import threading

import pytest

from cloudvmm.client.error import BadReply, ConnectionFailed, NoAnswer
from cloudvmm.client.transport import Stream, UnixTransport
from support.deadline import HOST_S
from support.leak import Holdings
from support.peer import Peer, Talk, answering
from support.rest import same_file

DONE = b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
PONG = b"HTTP/1.1 200 \r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}"
FULL = b"HTTP/1.1 503\r\nConnection: close\r\nContent-Length: 4\r\n\r\nfull"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "api")


@pytest.fixture
def transport(path):
    before = Holdings()
    with UnixTransport(path, timeout_s=10.0) as made:
        yield made
    before.assert_nothing_added()


def test_requests_share_one_connection(path, transport):
    with Peer(path, answering(PONG, DONE, PONG)):
        statuses = [
            transport.request("GET", "vmm.ping").status,
            transport.request("PUT", "vm.create", b"{}").status,
            transport.request("GET", "vmm.ping").status,
        ]

    assert statuses == [200, 204, 200]


def test_request_is_laid_out_as_the_reference_client_does(path, transport):
    seen = []

    def script(talk: Talk):
        seen.append(talk.read_request())
        talk.send(DONE)

    with Peer(path, script):
        transport.request("PUT", "vm.resize", b'{"desired_vcpus":2}')

    assert seen == [
        b"PUT /api/v1/vm.resize HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nContent-Length: 19\r\n\r\n"
        b'{"desired_vcpus":2}'
    ]


def test_no_server_means_that_nothing_has_run(transport):
    with pytest.raises(ConnectionFailed) as caught:
        transport.request("PUT", "vm.boot")

    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert caught.value.may_have_run is False


def test_server_with_a_full_queue_is_given_up_at_the_deadline(path, transport):
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(ConnectionFailed) as caught:
            transport.request("GET", "vmm.ping", timeout_s=0.05)

    assert isinstance(caught.value.__cause__, TimeoutError)


def test_descriptors_travel_with_the_request_and_stay_ours(path, transport, tmp_path):
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    same = []

    def script(talk: Talk):
        talk.read_request()
        same.extend(same_file(fd, received) for received in talk.fds)
        talk.send(DONE)

    with Peer(path, script):
        transport.request("PUT", "vm.add-net", b"{}", [fd, fd])

    assert same == [True, True]
    os.close(fd)


def test_more_descriptors_than_a_message_carries_are_refused(transport):
    with pytest.raises(ValueError, match="253"):
        transport.request("PUT", "vm.add-net", b"{}", [0] * 254)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_connection_that_the_server_closed_meanwhile_is_replaced(path, transport, method):
    with Peer(path, answering(PONG), answering(PONG)) as peer:
        transport.request("GET", "vmm.ping")
        peer.wait_played()
        assert transport.request(method, "vm.boot").status == 200


def test_server_full_is_a_reply_though_it_closes_without_reading(path, transport):
    with Peer(path, lambda talk: talk.send(FULL)):
        reply = transport.request("PUT", "vm.boot")

    assert (reply.status, reply.body) == (503, b"full")


def hears_and_closes(talk: Talk):
    assert talk.read_request()


def hears_twice_and_answers_once(talk: Talk):
    talk.read_request()
    talk.send(PONG)
    talk.read_request()


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_fresh_connection_lost_after_the_request_may_have_run(path, transport, method):
    with Peer(path, hears_and_closes), pytest.raises(NoAnswer, match="may or may not have run"):
        transport.request(method, "vm.info")


def test_change_is_not_sent_twice_when_a_kept_connection_is_lost(path, transport):
    with Peer(path, hears_twice_and_answers_once):
        transport.request("GET", "vmm.ping")
        with pytest.raises(NoAnswer) as caught:
            transport.request("PUT", "vm.boot")

    assert caught.value.may_have_run is True
    assert caught.value.command == "vm.boot"


def test_read_is_sent_again_when_a_kept_connection_is_lost(path, transport):
    with Peer(path, hears_twice_and_answers_once, answering(PONG)):
        transport.request("GET", "vmm.ping")
        assert transport.request("GET", "vmm.ping").status == 200


def test_silent_server_is_given_up_at_the_deadline(path, transport):
    with (
        Peer(path, lambda talk: talk.read_request() and talk.wait_closed()),
        pytest.raises(NoAnswer) as caught,
    ):
        transport.request("GET", "vmm.ping", timeout_s=0.05)

    assert isinstance(caught.value.__cause__, TimeoutError)


def test_server_that_does_not_read_is_given_up_before_the_request_is_whole(path, transport):
    given_up = threading.Event()
    with Peer(path, lambda _: given_up.wait(HOST_S)):
        with pytest.raises(ConnectionFailed) as caught:
            transport.request("PUT", "vm.create", b" " * (8 << 20), timeout_s=0.1)
        given_up.set()

    assert isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize("raw", [b"garbage garbage", PONG[:30]])
def test_connection_that_speaks_something_else_is_dropped(path, transport, raw):
    with Peer(path, answering(raw), answering(PONG)):
        with pytest.raises(BadReply):
            transport.request("GET", "vmm.ping")
        assert transport.request("GET", "vmm.ping").status == 200


@pytest.mark.parametrize("extra", [PONG + b"more", PONG.replace(b"keep-alive", b"close")])
def test_connection_that_is_at_its_end_is_not_kept(path, transport, extra):
    with Peer(path, answering(extra), answering(PONG)):
        assert transport.request("GET", "vmm.ping").body == b"{}"
        assert transport.request("GET", "vmm.ping").body == b"{}"


def test_long_command_does_not_hold_up_another_thread(path, transport):
    heard, answer_now = threading.Event(), threading.Event()
    replies = []

    def slow(talk: Talk):
        talk.read_request()
        heard.set()
        assert answer_now.wait(HOST_S)
        talk.send(DONE)

    with Peer(path, slow, answering(PONG)):
        thread = threading.Thread(target=lambda: replies.append(transport.request("PUT", "vm.snapshot")))
        thread.start()
        assert heard.wait(HOST_S)
        assert transport.request("GET", "vmm.ping").status == 200
        answer_now.set()
        thread.join(HOST_S)

    assert [reply.status for reply in replies] == [204]


def test_few_connections_are_kept_after_many_at_once(path, transport):
    together = threading.Barrier(3, timeout=HOST_S)

    def script(talk: Talk):
        talk.read_request()
        together.wait()
        talk.send(PONG)
        assert talk.wait_closed()

    with Peer(path, script, script, script) as peer:
        threads = [threading.Thread(target=transport.request, args=("GET", "vmm.ping")) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HOST_S)
        peer.wait_played()
        transport.close()


STREAM_HEAD = b"HTTP/1.1 200 \r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n"


def test_stream_is_read_until_the_server_ends_it(path, transport):
    def script(talk: Talk):
        assert talk.read_request().startswith(b"GET /api/v1/vm.events?from=3 HTTP/1.1\r\n")
        talk.send(STREAM_HEAD + b"one")
        talk.send(b"two")

    with Peer(path, script):
        stream = transport.open_stream("vm.events?from=3")
        pieces = b""
        while piece := stream.read(timeout_s=HOST_S):
            pieces += piece
        stream.close()

    assert pieces == b"onetwo"


def test_stream_that_is_silent_can_be_read_on_later(path, transport):
    say = threading.Event()

    def script(talk: Talk):
        talk.read_request()
        talk.send(STREAM_HEAD)
        say.wait(HOST_S)
        talk.send(b"late")

    with Peer(path, script):
        stream = transport.open_stream("vm.events")
        assert isinstance(stream, Stream)
        with pytest.raises(TimeoutError):
            stream.read(timeout_s=0.05)
        say.set()
        assert stream.read(timeout_s=HOST_S) == b"late"
        stream.close()


def test_server_without_streams_gives_a_reply(path, transport):
    with Peer(path, answering(b"HTTP/1.1 404 \r\nContent-Length: 13\r\n\r\n" + b'["Not Found"]')):
        assert transport.open_stream("vm.events").status == 404


def test_socket_path_may_be_a_path_object(tmp_path):
    with Peer(str(tmp_path / "api"), answering(PONG)), UnixTransport(tmp_path / "api") as transport:
        assert transport.request("GET", "vmm.ping").status == 200


def test_closed_transport_connects_anew(path, transport):
    with Peer(path, answering(PONG), answering(PONG)):
        transport.request("GET", "vmm.ping")
        transport.close()
        assert transport.request("GET", "vmm.ping").status == 200


def test_something_else_than_a_socket_is_no_server(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(ConnectionFailed) as caught:
        UnixTransport(tmp_path / "file").request("GET", "vmm.ping")

    assert isinstance(caught.value.__cause__, (ConnectionRefusedError, socket.error))


FORKING = """
import os, sys
from cloudvmm.client.transport import UnixTransport
with UnixTransport(sys.argv[1], timeout_s=60.0) as transport:
    transport.request("GET", "parents.first")
    if not (child := os.fork()):
        transport.request("GET", "childs")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    transport.request("GET", "parents.second")
"""


def test_child_of_fork_leaves_the_parents_connection_alone(path):
    asked = {"parent": [], "child": []}

    def script(talk: Talk, who):
        while request := talk.read_request():
            asked[who].append(request.split(b" ")[1])
            talk.send(PONG)

    with Peer(path, lambda talk: script(talk, "parent"), lambda talk: script(talk, "child")):
        ended = subprocess.run([sys.executable, "-c", FORKING, path], timeout=20, check=False)

    assert ended.returncode == 0
    assert asked == {
        "parent": [b"/api/v1/parents.first", b"/api/v1/parents.second"],
        "child": [b"/api/v1/childs"],
    }
