"""What network devices stand on: limits as one bucket, back ends that speak or not, ports that are free."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from cloudvmm.config.net import NetConfig, VhostMode
from cloudvmm.config.rate_limit import RateLimiterConfig, TokenBucketConfig
from cloudvmm.config.user_net import UserNetConfig
from cloudvmm.engine.base import DeviceError, DriverKind, MachineGone
from cloudvmm.engine.qemu import user_net, vhost_user, vhost_user_net
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.net_limit import bucket_of
from cloudvmm.engine.qemu.user_net import ForwardNotPossible, PasstTooOld, open_user_net, user_netdev
from cloudvmm.engine.qemu.vhost_user import (
    BadQueueNum,
    VhostUserConnectError,
    VhostUserFeaturesError,
    connect,
)
from cloudvmm.engine.qemu.vhost_user_net import (
    VhostUserListenError,
    VhostUserNoBackend,
    open_vhost_user_net,
)
from cloudvmm.engine.qemu.vhost_user_relay import Relay
from cloudvmm.host.limit import Bucket
from cloudvmm.vhost.message import HEADER, receive
from support.deadline import HOST_S
from support.leak import Holdings
from support.vhost_user import back_end
from support.wait import wait_until
from support.watch import Watch

FEATURES = HEADER.pack(1, 5, 8) + bytes(8)


def tokens(size: int, refill_time: int) -> TokenBucketConfig:
    return TokenBucketConfig(size=size, refill_time=refill_time)


@pytest.mark.parametrize(
    ("bandwidth", "ops", "pairs", "bucket"),
    [
        (None, None, 1, None),
        (tokens(0, 100), tokens(100, 0), 1, None),
        (tokens(1000, 100), None, 1, (10_000, 1000, 0)),
        (tokens(1000, 100), None, 2, (20_000, 2000, 0)),
        (None, tokens(10, 100), 1, (100 * 65535, 10 * 65535, 65535)),
        (tokens(10**6, 1000), tokens(1000, 1000), 1, (10**6, 10**6, 1000)),
        (tokens(10**6, 1000), tokens(100, 100), 1, (10**6, 10**5, 1000)),
        (tokens(10**9, 1000), tokens(10, 1000), 1, (10 * 65535, 10 * 65535, 65535)),
    ],
)
def test_two_buckets_become_one(bandwidth, ops, pairs, bucket):
    made = bucket_of(RateLimiterConfig(bandwidth=bandwidth, ops=ops), queue_pairs=pairs)
    wanted = bucket and Bucket(bytes_per_s=bucket[0], size_bytes=bucket[1], least_bytes=bucket[2])
    assert made == wanted


def test_no_limiter_is_no_bucket():
    assert bucket_of(None, queue_pairs=1) is None


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(vhost_user_net, "_BACK_END_S", 0.2)
    monkeypatch.setattr(vhost_user, "ANSWER_S", 0.2)


def net(path, mode=VhostMode.CLIENT):
    return NetConfig(id="n", vhost_user=True, vhost_socket=str(path), vhost_mode=mode)


def test_missing_back_end_is_waited_for_and_then_told(short, tmp_path):
    holdings = Holdings()
    with pytest.raises(VhostUserConnectError) as caught:
        open_vhost_user_net(net(tmp_path / "none"), Attempt())
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert caught.value.__cause__.filename == str(tmp_path / "none")
    holdings.assert_nothing_added()


def test_socket_that_nobody_serves_any_more_is_told(short, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    with pytest.raises(VhostUserConnectError) as caught:
        open_vhost_user_net(net(tmp_path / "s"), Attempt())
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_file_that_is_no_socket_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    with Watch() as watch, pytest.raises(VhostUserConnectError):
        open_vhost_user_net(net(tmp_path / "file"), Attempt())
    assert watch.elapsed_s < vhost_user_net._BACK_END_S / 2


@pytest.mark.parametrize("answer", [b"", b"x", bytes(20), None], ids=["closed", "cut", "zeros", "silent"])
def test_back_end_that_does_not_speak_is_told(short, tmp_path, answer):
    holdings = Holdings()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        done = threading.Event()
        thread = threading.Thread(target=answer_once, args=(listener, answer, done))
        thread.start()
        with pytest.raises(VhostUserFeaturesError):
            open_vhost_user_net(net(tmp_path / "s"), Attempt())
        done.set()
        thread.join()
    holdings.assert_nothing_added()


def test_device_of_a_back_end_is_told_of_as_one(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        thread = threading.Thread(target=answer_once, args=(listener, FEATURES, None))
        thread.start()
        backing = open_vhost_user_net(net(tmp_path / "s"), Attempt())
        thread.join()
    try:
        assert backing.driver_kind is DriverKind.VHOST_USER
    finally:
        backing.close()


def answer_once(listener, answer, done):
    connection, _ = listener.accept()
    with connection:
        connection.recv(HEADER.size)
        if answer is None:
            done.wait(HOST_S)
        else:
            connection.sendall(answer)


def test_back_end_that_never_comes_ends_the_waiting_and_leaves_no_socket(short, tmp_path):
    holdings = Holdings()
    with pytest.raises(VhostUserNoBackend, match="No vhost-user back end connected to"):
        open_vhost_user_net(net(tmp_path / "s", VhostMode.SERVER), Attempt())
    assert not (tmp_path / "s").exists()
    holdings.assert_nothing_added()


@pytest.mark.parametrize("mode", VhostMode)
def test_waiting_for_a_back_end_ends_at_once_when_it_is_aborted(tmp_path, mode):
    holdings = Holdings()
    attempt = Attempt("The addition")
    timer = threading.Timer(0.1, attempt.abort)
    timer.start()
    with Watch() as watch, pytest.raises(MachineGone, match="The addition was aborted"):
        open_vhost_user_net(net(tmp_path / "s", mode), attempt)
    assert watch.elapsed_s < vhost_user_net._BACK_END_S / 2
    timer.join()
    assert not (tmp_path / "s").exists()
    holdings.assert_nothing_added()


def test_waiting_for_an_answer_ends_at_once_when_it_is_aborted(tmp_path):
    attempt, done = Attempt(), threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        thread = threading.Thread(target=answer_once, args=(listener, None, done))
        thread.start()
        timer = threading.Timer(0.1, attempt.abort)
        timer.start()
        with Watch() as watch, pytest.raises(MachineGone):
            open_vhost_user_net(net(tmp_path / "s"), attempt)
        assert watch.elapsed_s < vhost_user.ANSWER_S / 2
        done.set()
        timer.join()
        thread.join()


def test_back_end_with_too_few_queues_is_refused(tmp_path):
    config = NetConfig(id="n", vhost_user=True, vhost_socket=str(tmp_path / "s"), num_queues=6)
    with back_end(tmp_path / "s", queues=2), pytest.raises(BadQueueNum):
        open_vhost_user_net(config, Attempt())


def test_place_that_is_taken_is_no_place_to_listen(tmp_path):
    (tmp_path / "s").touch()
    with pytest.raises(VhostUserListenError):
        open_vhost_user_net(net(tmp_path / "s", VhostMode.SERVER), Attempt())
    assert (tmp_path / "s").exists()


def test_relay_carries_messages_whole_with_their_descriptors_and_ends(tmp_path):
    holdings = Holdings()
    backend, ours = socket.socketpair()
    relay = Relay(ours)
    with backend, socket.socket(socket.AF_UNIX) as qemu:
        qemu.settimeout(HOST_S)
        backend.settimeout(HOST_S)
        qemu.connect(relay.path)
        qemu.sendall(HEADER.pack(1, 1, 0))
        with open(os.devnull, "rb") as file:
            socket.send_fds(qemu, [HEADER.pack(12, 1, 8) + bytes(8)], [file.fileno()])
        first = socket.recv_fds(backend, HEADER.size, 8)
        second = socket.recv_fds(backend, HEADER.size + 8, 8)
        assert (first[0], first[1]) == (HEADER.pack(1, 1, 0), [])
        assert second[0] == HEADER.pack(12, 1, 8) + bytes(8)
        (fd,) = second[1]
        assert os.readlink(f"/proc/self/fd/{fd}") == os.devnull
        os.close(fd)
        backend.sendall(FEATURES)
        assert qemu.recv(100) == FEATURES
        relay.close()
        assert qemu.recv(1) == b""
        assert backend.recv(1) == b""
    relay.close()
    assert not os.path.exists(relay.path)
    holdings.assert_nothing_added()


def test_relay_lets_qemu_come_back_when_there_is_a_new_connection(tmp_path):
    holdings = Holdings()
    theirs, ours = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    is_back = threading.Event()

    def renew(attempt):
        if not is_back.is_set():
            raise DeviceError("Not yet")
        return ours[1]

    relay = Relay(ours[0], renew=renew)
    try:
        for number, backend in enumerate(theirs):
            with backend, socket.socket(socket.AF_UNIX) as qemu:
                qemu.settimeout(HOST_S)
                qemu.connect(relay.path)
                qemu.sendall(HEADER.pack(number, 1, 0))
                assert receive(backend, HEADER.size) == HEADER.pack(number, 1, 0)
                if number == 0:
                    assert not os.path.exists(relay.path)
                    backend.close()
                    assert qemu.recv(1) == b""
                    is_back.set()
                    wait_until(lambda: os.path.exists(relay.path), "the relay listens", timeout_s=HOST_S)
    finally:
        relay.close()
    assert not os.path.exists(os.path.dirname(relay.path))
    holdings.assert_nothing_added()


def test_relay_without_its_back_end_ends(tmp_path):
    holdings = Holdings()
    backend, ours = socket.socketpair()
    relay = Relay(ours, renew=lambda attempt: connect(str(tmp_path / "s"), timeout_s=10, attempt=attempt))
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.settimeout(HOST_S)
        qemu.connect(relay.path)
        backend.close()
        assert qemu.recv(1) == b""
    relay.close()
    holdings.assert_nothing_added()


def test_relay_that_nobody_used_ends(tmp_path):
    holdings = Holdings()
    backend, ours = socket.socketpair()
    with backend:
        relay = Relay(ours)
        relay.close()
        assert backend.recv(1) == b""
    assert not os.path.exists(relay.path)
    holdings.assert_nothing_added()


@pytest.mark.parametrize(("protocol", "kind"), [("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)])
def test_taken_port_is_told_with_the_forward(protocol, kind):
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            holder.listen()
        text = f"{protocol}:127.0.0.1:{holder.getsockname()[1]}:80"
        with pytest.raises(ForwardNotPossible, match=text) as caught:
            open_user_net(NetConfig(id="n"), UserNetConfig(forwards=[text]), Attempt())
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("version", ["passt 0.0~git20230309.7c7625d-1", "passt unknown version", ""])
def test_old_passt_is_left_alone_and_qemu_does_it_itself(tmp_path, monkeypatch, version):
    monkeypatch.setattr(user_net, "find_program", lambda *_, **__: make_passt(tmp_path, version))
    with pytest.raises(PasstTooOld):
        user_net._check_version(make_passt(tmp_path, version), Attempt())
    backing = open_user_net(NetConfig(id="n"), UserNetConfig(), Attempt())
    assert user_netdev(backing, netdev_id="x")["type"] == "user"


@pytest.mark.parametrize("version", ["passt 0.0~git20250503.587980c-2", "passt 2024_06_07.8a83b53"])
def test_passt_that_ends_at_once_is_no_loss(tmp_path, monkeypatch, version):
    holdings = Holdings()
    monkeypatch.setattr(user_net, "find_program", lambda *_, **__: make_passt(tmp_path, version))
    user_net._check_version(make_passt(tmp_path, version), Attempt())
    backing = open_user_net(NetConfig(id="n"), UserNetConfig(), Attempt())
    assert (backing.fds, backing.companion) == ([], None)
    holdings.assert_nothing_added()


def make_passt(folder, version):
    program = folder / "passt"
    program.write_text(f'#!/bin/sh\n[ "$1" != --version ] || exec echo "{version}"\nexit 1\n')
    program.chmod(0o755)
    return str(program)
