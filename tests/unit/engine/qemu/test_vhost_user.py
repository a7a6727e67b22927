"""Connecting to vhost-user back ends: those that talk, and those that do not."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable

import pytest

from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu import vhost_user
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking, connect, open_vhost_user
from support.deadline import HOST_S
from support.leak import Holdings
from support.vhost_user import back_end

HEADER = struct.Struct("=III")


@pytest.fixture(autouse=True)
def no_leak(monkeypatch):
    monkeypatch.setattr(vhost_user, "CONNECT_S", 0.1)
    monkeypatch.setattr(vhost_user, "ANSWER_S", HOST_S)
    before = Holdings()
    yield
    before.assert_nothing_added()


@contextlib.contextmanager
def lying(path, answer: Callable[[socket.socket], None]):
    """Let `answer` deal with the one connection to `path`."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def until_the_end(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        while connection.recv(4096):
            continue


def send(data: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.recv(12)
        connection.sendall(data)
        until_the_end(connection)

    return answer


def close(connection: socket.socket) -> None:
    connection.recv(12)


CLOSED = "The back end closed the connection"
SILENT = "The back end did not answer within 0.2 s"
FOREIGN = "The back end does not speak vhost-user"
LIARS = {
    "closes at once": (lambda connection: None, CLOSED),
    "closes when asked": (close, CLOSED),
    "closes in the middle": (lambda connection: connection.sendall(b"\1\0\0\0"), CLOSED),
    "is silent": (until_the_end, SILENT),
    "stops in the middle": (send(HEADER.pack(1, 5, 8)), SILENT),
    "answers something else": (send(HEADER.pack(15, 5, 8) + bytes(8)), FOREIGN),
    "does not answer but ask": (send(HEADER.pack(1, 1, 8) + bytes(8)), FOREIGN),
    "answers too much": (send(HEADER.pack(1, 5, 9) + bytes(9)), FOREIGN),
    "speaks HTTP": (send(b"HTTP/1.1 400 Bad Request\r\n\r\n"), FOREIGN),
}


@pytest.mark.parametrize(("answer", "words"), LIARS.values(), ids=LIARS)
def test_back_end_that_does_not_talk_is_found_out(tmp_path, monkeypatch, answer, words):
    if words == SILENT:
        monkeypatch.setattr(vhost_user, "ANSWER_S", 0.2)
    path = tmp_path / "s"
    with lying(path, answer), pytest.raises(DeviceError, match="^Get features failed$") as caught:
        open_vhost_user("one", str(path), queues=2)
    assert str(caught.value.__cause__) == words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "No such file"),
        ("none/none", "No such file"),
        ("x" * 108, "too long"),
        ("nul\0", "NUL"),
    ],
)
def test_socket_that_cannot_be_connected_to_says_why(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DeviceError, match="^Connection to socket failed$") as caught:
        open_vhost_user("one", name, queues=2)
    assert words in str(caught.value.__cause__)


def test_back_end_that_is_about_to_listen_is_awaited(tmp_path):
    path = tmp_path / "s"
    late = socket.socket(socket.AF_UNIX)

    def listen() -> None:
        late.bind(str(path))
        late.listen()

    timer = threading.Timer(0.1, listen)
    timer.start()
    connect(str(path), timeout_s=10, attempt=Attempt()).close()
    timer.join()
    late.close()


def test_connection_is_made_through_a_name_that_is_no_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        connect(os.fsdecode(path), timeout_s=10, attempt=Attempt()).close()


def test_closing_ends_the_connection_for_whoever_shares_it(tmp_path):
    with back_end(tmp_path / "s"):
        backing = open_vhost_user("one", str(tmp_path / "s"), queues=2)
        assert backing.fds == [backing.fd]
        with socket.socket(fileno=os.dup(backing.fd)) as qemus:
            backing.close()
            backing.close()
            assert qemus.recv(1) == b""
    assert backing.fds == []


def test_backing_without_a_connection_closes_nothing():
    VhostUserBacking(device_id="a", path="/run/s").close()


def test_back_end_with_too_few_queues_is_refused(tmp_path):
    with back_end(tmp_path / "s", queues=2), pytest.raises(DeviceError, match="^Queue number  is") as caught:
        open_vhost_user("one", str(tmp_path / "s"), queues=3)
    assert str(caught.value.__cause__) == "The back end has 2 queues, and 3 are needed"


@pytest.mark.parametrize(("config", "found"), [(None, b""), (b"", bytes(4)), (b"share", b"shar")])
def test_configuration_is_what_the_back_end_has(tmp_path, config, found):
    with back_end(tmp_path / "s", config=config):
        backing = open_vhost_user("one", str(tmp_path / "s"), queues=1, config_bytes=4)
    assert backing.config == found
    backing.close()


def test_host_that_stands_still_uses_up_none_of_the_tries(tmp_path):
    path, pauses = tmp_path / "s", []
    with socket.socket(socket.AF_UNIX) as late:

        class LongPauses(Attempt):
            def pause(self, seconds: float) -> None:
                super().pause(2 * vhost_user.CONNECT_S)
                pauses.append(seconds)
                if len(pauses) == 2:
                    late.bind(str(path))
                    late.listen()

        connect(str(path), timeout_s=vhost_user.CONNECT_S, attempt=LongPauses()).close()
