"""The server's life: its socket, its lock, its connections, its end. rest.md section 1."""

import contextlib
import os
import resource
import socket
import stat
import threading
import time

import pytest

from cloudvmm import api
from cloudvmm.errors import error_chain
from cloudvmm.http import (
    ApiServerSocketFailed,
    ApiSocketInUse,
    HttpServerError,
    NotAListener,
    start_http_fd_thread,
    start_http_path_thread,
)
from cloudvmm.http import server as http_server
from cloudvmm.http.server import CLOSE_DEADLINE_S
from support.deadline import HOST_S
from support.leak import Holdings
from support.rest import PING, PONG, RestClient, request_bytes
from support.wait import wait_until
from support.watch import Watch

FULL = (
    b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\n"
    b"X-Cloudvmm-Error: TooManyConnections\r\nContent-Length: 40\r\n\r\n"
    b'{ "error": "Too many open connections" }'
)


def leave_stale_socket(path):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
        left.listen()


# The socket


def test_socket_is_its_owner_s_alone_whatever_the_umask(vmm, socket_path):
    old = os.umask(0)
    try:
        server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    finally:
        os.umask(old)
    status = os.stat(socket_path)
    server.close()
    assert (stat.S_ISSOCK(status.st_mode), stat.S_IMODE(status.st_mode)) == (True, 0o600)
    assert stat.S_IMODE(os.stat(f"{socket_path}.lock").st_mode) == 0o600


def test_stale_socket_is_replaced(vmm, socket_path):
    leave_stale_socket(socket_path)
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    with RestClient(socket_path) as client:
        assert client.ping().status == 200
    server.close()


def test_restart_on_the_socket_left_by_the_last_one(vmm, socket_path):
    for _ in range(3):
        server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
        with RestClient(socket_path) as client:
            assert client.ping().status == 200
        server.close()
        assert os.path.exists(socket_path)


def test_second_server_on_the_path_is_refused_and_the_first_goes_on(server, vmm, client, socket_path):
    with pytest.raises(ApiSocketInUse) as refused:
        start_http_path_thread(socket_path, vmm.event, vmm.sender)
    assert str(refused.value) == f'API socket "{socket_path}" is already in use by another running instance'
    assert client.ping().status == 200
    with RestClient(socket_path) as other:
        assert other.ping().status == 200


def test_lock_is_seen_by_other_processes(server, socket_path):
    pid = os.fork()
    if pid == 0:
        try:
            start_http_path_thread(socket_path, api.EventFd(), api.api_channel()[0])
        except ApiSocketInUse:
            os._exit(42)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


def test_lock_file_stays_and_the_socket_too_unless_asked(vmm, socket_path):
    start_http_path_thread(socket_path, vmm.event, vmm.sender).close()
    assert os.path.exists(socket_path)
    start_http_path_thread(socket_path, vmm.event, vmm.sender).close(remove_socket=True)
    assert not os.path.exists(socket_path)
    assert os.path.exists(f"{socket_path}.lock")


@pytest.mark.parametrize("name", ["missing/api.sock", "x" * 120, "nul\0byte"])
def test_socket_that_cannot_be_made_is_an_error_with_its_cause(vmm, tmp_path, name):
    before = Holdings()
    with pytest.raises(ApiServerSocketFailed) as failed:
        start_http_path_thread(str(tmp_path / name), vmm.event, vmm.sender)
    assert str(failed.value) == "Error creation API server's socket"
    assert isinstance(failed.value.__cause__, OSError | ValueError)
    before.assert_nothing_added()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/api", "No such file or directory"),
        ("file/api", "Not a directory"),
        ("locked", "Is a directory"),
    ],
)
def test_socket_that_cannot_be_made_is_named_and_not_its_lock(vmm, tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "locked.lock").mkdir()
    with pytest.raises(ApiServerSocketFailed) as failed:
        start_http_path_thread(str(tmp_path / name), vmm.event, vmm.sender)
    at_fault = tmp_path / ("locked.lock" if name == "locked" else name)
    assert error_chain(failed.value)[1].startswith(f"{reason}: {at_fault} (os error ")


def test_empty_path_is_an_error(vmm):
    with pytest.raises(ApiServerSocketFailed):
        start_http_path_thread("", vmm.event, vmm.sender)


def test_second_close_waits_for_the_first_and_says_the_same(vmm, socket_path):
    vmm.answer("vmm.ping", lambda request: None)  # nobody answers: the first close runs into its deadline
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    with RestClient(socket_path) as client:
        client.send(PING)
        vmm.await_request("vmm.ping")
        answers: list[bool] = []
        first = threading.Thread(target=lambda: answers.append(server.close(deadline_s=0.3)))
        first.start()
        wait_until(lambda: server._is_closing, "the first close", timeout_s=HOST_S)
        second = server.close()
        first.join(HOST_S)

    assert (answers, second) == ([False], False)


@pytest.fixture
def no_more_threads(monkeypatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def forbid():
        return monkeypatch.setattr(threading.Thread, "start", refuse)

    return forbid


def test_server_without_a_thread_leaves_nothing(vmm, socket_path, no_more_threads):
    before = Holdings()
    no_more_threads()
    with pytest.raises(ApiServerSocketFailed):
        start_http_path_thread(socket_path, vmm.event, vmm.sender)
    assert not os.path.exists(socket_path)
    before.assert_nothing_added()


def test_server_without_a_thread_leaves_an_inherited_socket_to_its_owner(vmm, socket_path, no_more_threads):
    with socket.socket(socket.AF_UNIX) as inherited:
        inherited.bind(socket_path)
        inherited.listen()
        before = Holdings()
        no_more_threads()
        with pytest.raises(ApiServerSocketFailed):
            start_http_fd_thread(inherited.fileno(), vmm.event, vmm.sender)
        before.assert_nothing_added()
        assert inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def test_closing_twice_is_as_once(vmm, socket_path):
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    assert server.close() is True
    assert server.close() is True


# The inherited descriptor


@pytest.fixture
def inherited(socket_path):
    """A listening socket that somebody else made."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(socket_path)
        listening.listen()
        yield listening


def test_inherited_socket_is_served_without_a_lock_and_left_in_place(vmm, inherited, socket_path):
    server = start_http_fd_thread(os.dup(inherited.fileno()), vmm.event, vmm.sender)
    with RestClient(socket_path) as client:
        assert client.ping().status == 200
    server.close(remove_socket=True)
    assert os.path.exists(socket_path)
    assert not os.path.exists(f"{socket_path}.lock")


def test_inherited_socket_is_not_passed_on_to_children(vmm, inherited):
    fd = os.dup(inherited.fileno())
    os.set_inheritable(fd, True)
    server = start_http_fd_thread(fd, vmm.event, vmm.sender)
    assert not os.get_inheritable(fd)
    server.close()


def test_what_is_no_listening_socket_is_refused_and_stays_open(vmm, tmp_path):
    ends = [*socket.socketpair(), socket.socket(socket.AF_INET), (tmp_path / "file").open("w")]
    for end in ends:
        with pytest.raises(NotAListener):
            start_http_fd_thread(end.fileno(), vmm.event, vmm.sender)
        os.fstat(end.fileno())
        end.close()


@pytest.mark.parametrize("fd", [10_000, -1])
def test_descriptor_that_is_not_open_is_refused(vmm, fd):
    with pytest.raises(HttpServerError):
        start_http_fd_thread(fd, vmm.event, vmm.sender)


# Connections


def test_eleventh_connection_is_turned_away_and_the_ten_go_on(server, socket_path):
    ten = [RestClient(socket_path) for _ in range(10)]
    assert [client.ping().status for client in ten] == [200] * 10
    with RestClient(socket_path) as eleventh:
        assert eleventh.reply().raw == FULL
        assert eleventh.is_closed()
    assert [client.ping().status for client in ten] == [200] * 10
    for client in ten:
        client.close()


def test_eleventh_that_has_already_asked_still_reads_why(server, socket_path):
    ten = [RestClient(socket_path) for _ in range(10)]
    wait_until(lambda: server.connection_count == 10, "ten connections", timeout_s=HOST_S)
    with RestClient(socket_path) as eleventh:
        with contextlib.suppress(BrokenPipeError):  # It may have been turned away before it could ask.
            eleventh.send(PING)
        assert eleventh.reply().raw == FULL
    for client in ten:
        client.close()


def test_place_of_a_client_that_left_is_free_at_once(server, socket_path):
    clients = [RestClient(socket_path) for _ in range(10)]
    for client in clients:
        client.ping()
    for _ in range(50):
        clients.pop(0).close()
        clients.append(RestClient(socket_path))
        assert clients[-1].ping().status == 200
    for client in clients:
        client.close()


@contextlib.contextmanager
def no_more_descriptors(*, than=0):
    """Let the process open `than` more descriptors and no other."""
    free = [os.dup(0) for _ in range(than + 1)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for fd in free:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_client_that_comes_while_there_is_no_room_is_served_when_there_is(server, client, socket_path):
    client.ping()
    with socket.socket(socket.AF_UNIX) as late:
        late.settimeout(HOST_S)
        with no_more_descriptors():
            late.connect(socket_path)
            late.sendall(PING)
            assert client.ping().status == 200
        assert late.recv(100).startswith(b"HTTP/1.1 200 \r\n")


def test_client_whose_descriptors_find_no_room_is_told(client, vmm):
    client.ping()
    before = Holdings()
    with no_more_descriptors(than=2):
        client.send(request_bytes("PUT", "/api/v1/vm.add-net", {}), [0] * 5)
        reply = client.reply()
    assert (reply.status, reply.texts()) == (
        500,
        ["No room for the file descriptors that came with the request"],
    )
    assert client.is_closed()
    assert vmm.names() == ["vmm.ping"]
    assert [held for held in before.added() if "socket" not in held] == []


def test_limit_can_be_raised(vmm, socket_path):
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender, max_connections=12)
    clients = [RestClient(socket_path) for _ in range(12)]
    assert [client.ping().status for client in clients] == [200] * 12
    with RestClient(socket_path) as one_more:
        assert one_more.reply().status == 503
    for client in clients:
        client.close()
    server.close()


def test_two_hundred_connections_leave_nothing(vmm, socket_path):
    before = Holdings()
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    for number in range(200):
        with RestClient(socket_path) as client:
            client.send(PING if number % 3 else PING[:20])
            assert number % 3 == 0 or client.reply().status == 200
    assert server.close() is True
    assert before.added() == []


def test_command_that_takes_long_keeps_no_other_connection_waiting(client, vmm, server, socket_path):
    vmm.answer("vm.boot", lambda request: None)
    client.send(request_bytes("PUT", "/api/v1/vm.boot"))
    boot = vmm.await_request("vm.boot")
    with RestClient(socket_path) as other:
        assert [other.ping().status for _ in range(20)] == [200] * 20
    assert client.is_quiet()
    boot.reply.send(api.Empty())
    assert client.reply().status == 204


def test_client_that_does_not_read_keeps_nobody_waiting(client, vmm, socket_path):
    vmm.answer("vm.counters", api.VmActionPayload(b"{" + b" " * (8 << 20) + b"}"))
    client.send(request_bytes("GET", "/api/v1/vm.counters"))
    vmm.await_request("vm.counters")
    with RestClient(socket_path) as other:
        assert other.ping().status == 200
    assert len(client.reply().body) == (8 << 20) + 2


@pytest.fixture
def hasty_server(vmm, socket_path):
    """One that waits for nobody for long."""
    running = start_http_path_thread(socket_path, vmm.event, vmm.sender, request_s=0.3)
    yield running
    running.close(deadline_s=2.0)


HALF = b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"


def test_request_that_stops_in_its_middle_is_refused_and_gives_its_place_back(hasty_server, socket_path):
    with RestClient(socket_path) as client:
        client.send(HALF)
        reply = client.reply()
        assert reply.status == 400
        assert reply.texts() == ["The request did not end within 0.3 s"]
        assert reply.code == "RequestTooSlow"
        assert client.is_closed()
    wait_until(lambda: hasty_server.connection_count == 0, "the connection's end", timeout_s=HOST_S)


def test_request_that_comes_by_the_byte_has_no_longer(hasty_server, socket_path):
    with RestClient(socket_path) as client:
        deadline = time.monotonic() + HOST_S
        with contextlib.suppress(OSError):
            for byte in b"PUT / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000:
                if not client.is_quiet() or time.monotonic() > deadline:
                    break
                client.send(bytes((byte,)))
        assert client.reply().status == 400


def test_client_that_is_silent_between_requests_stays(hasty_server, socket_path):
    with RestClient(socket_path) as client, RestClient(socket_path) as slow:
        assert client.ping().status == 200
        slow.send(HALF)
        assert slow.reply().status == 400  # longer than any request may take
        assert client.ping().status == 200


def test_client_that_takes_nothing_of_its_answer_gives_its_place_back(hasty_server, vmm, socket_path):
    vmm.answer("vm.counters", api.VmActionPayload(b"{" + b" " * (8 << 20) + b"}"))
    with RestClient(socket_path) as client:
        client.send(request_bytes("GET", "/api/v1/vm.counters"))
        vmm.await_request("vm.counters")
        wait_until(lambda: hasty_server.connection_count == 0, "the connection's end", timeout_s=HOST_S)


def test_client_that_dies_in_its_request_is_forgotten(server, socket_path):
    client = RestClient(socket_path)
    client.send(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 50\r\n\r\n{")
    wait_until(lambda: server.connection_count == 1, "the connection", timeout_s=HOST_S)
    client.close()
    wait_until(lambda: server.connection_count == 0, "the connection's end", timeout_s=HOST_S)


def test_client_that_dies_before_its_answer_is_forgotten_and_the_command_is_done(server, vmm, socket_path):
    vmm.answer("vm.boot", lambda request: None)
    client = RestClient(socket_path)
    client.send(request_bytes("PUT", "/api/v1/vm.boot"))
    boot = vmm.await_request("vm.boot")
    client.close()
    boot.reply.send(api.Empty())
    wait_until(lambda: server.connection_count == 0, "the connection's end", timeout_s=HOST_S)


def test_client_that_dies_in_its_answer_is_forgotten(server, vmm, socket_path):
    vmm.answer("vm.counters", api.VmActionPayload(b" " * (8 << 20)))
    client = RestClient(socket_path)
    client.send(request_bytes("GET", "/api/v1/vm.counters"))
    client.socket.recv(1)
    client.close()
    wait_until(lambda: server.connection_count == 0, "the connection's end", timeout_s=HOST_S)
    with RestClient(socket_path) as other:
        assert other.ping().status == 200


def test_mistake_of_ours_is_this_request_s_loss_alone(client, vmm):
    # A payload that cannot be sent: no client can cause it, a bug of ours could.
    vmm.answer("vm.counters", api.VmActionPayload("not bytes"))
    reply = client.ask("GET", "vm.counters")
    assert (reply.status, reply.body) == (500, b'["Internal Server Error"]')
    assert client.ping().status == 200


# The end


def test_answer_under_way_is_sent_before_the_end(vmm, socket_path):
    vmm.answer("vmm.shutdown", lambda request: None)
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    client = RestClient(socket_path)
    client.send(request_bytes("PUT", "/api/v1/vmm.shutdown"))
    shutdown = vmm.await_request("vmm.shutdown")
    closing = threading.Thread(target=server.close)
    closing.start()
    wait_until(lambda: not can_connect(socket_path), "the listening socket's end", timeout_s=HOST_S)
    shutdown.reply.send(api.Empty())
    assert client.reply().status == 200
    assert client.is_closed()
    closing.join(HOST_S)
    assert not closing.is_alive()
    client.close()


def can_connect(path):
    try:
        RestClient(path).close()
    except OSError:
        return False
    return True


def test_idle_connections_are_ended(vmm, socket_path):
    before = Holdings()
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    idle, half = RestClient(socket_path), RestClient(socket_path)
    idle.ping()
    half.send(PING[:10])
    with Watch() as watch:
        assert server.close() is True
    assert watch.elapsed_s < CLOSE_DEADLINE_S / 2
    assert idle.is_closed()
    assert half.is_closed()
    idle.close()
    half.close()
    assert before.added() == []


def test_connections_without_a_request_have_a_moment_left_at_the_deadline(vmm, socket_path, monkeypatch):
    """A host may stand still until it is over, and in that moment, too."""
    monkeypatch.setattr(http_server, "_LAST_MOMENT_S", HOST_S)
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    clients = [RestClient(socket_path) for _ in range(5)]
    for client in clients:
        client.ping()
    assert server.close(deadline_s=0.0) is True
    for client in clients:
        client.close()


def test_pipelined_requests_behind_the_one_under_way_are_not_begun(vmm, socket_path):
    vmm.answer("vm.boot", lambda request: None)
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    client = RestClient(socket_path)
    client.send(request_bytes("PUT", "/api/v1/vm.boot") + request_bytes("PUT", "/api/v1/vm.pause"))
    boot = vmm.await_request("vm.boot")
    closing = threading.Thread(target=server.close)
    closing.start()
    wait_until(lambda: not can_connect(socket_path), "the listening socket's end", timeout_s=HOST_S)
    boot.reply.send(api.Empty())
    assert client.reply().status == 204
    assert client.is_closed()
    closing.join(HOST_S)
    assert vmm.names() == ["vm.boot"]
    client.close()


def test_command_that_is_never_answered_is_cut_at_the_deadline(vmm, socket_path):
    before = Holdings()
    vmm.answer("vm.boot", lambda request: None)
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    client = RestClient(socket_path)
    client.send(request_bytes("PUT", "/api/v1/vm.boot"))
    vmm.await_request("vm.boot")
    assert server.close(deadline_s=0.2) is False
    client.close()
    assert before.added() == []


def test_client_that_never_reads_is_cut_at_the_deadline(vmm, socket_path):
    before = Holdings()
    vmm.answer("vm.counters", api.VmActionPayload(b" " * (8 << 20)))
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    client = RestClient(socket_path)
    client.send(request_bytes("GET", "/api/v1/vm.counters"))
    vmm.await_request("vm.counters")
    assert server.close(deadline_s=0.2) is False
    client.close()
    assert before.added() == []


def test_answer_after_the_cut_harms_nothing(vmm, socket_path):
    vmm.answer("vm.boot", lambda request: None)
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    client = RestClient(socket_path)
    client.send(request_bytes("PUT", "/api/v1/vm.boot"))
    boot = vmm.await_request("vm.boot")
    server.close(deadline_s=0)
    boot.reply.send(PONG)
    assert client.is_closed()
    client.close()
