"""One connection, its deadlines and its cut; and the listener before it."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from cloudvmm.migration.address import TcpAddress, UnixAddress
from cloudvmm.migration.cut import Cut
from cloudvmm.migration.error import (
    Cancelled,
    ConnectFailed,
    LinkDown,
    LinkTimeout,
    ListenFailed,
    PeerRefused,
    ProtocolError,
)
from cloudvmm.migration.link import Link, connect
from cloudvmm.migration.listener import Listener, greet
from cloudvmm.migration.message import Done, Hello, Ready, Refuse, Welcome, encode_message
from support.deadline import HOST_S
from support.leak import Holdings


@pytest.fixture
def cut():
    holdings = Holdings()
    cut = Cut()
    yield cut
    cut.close()
    holdings.assert_nothing_added()


@pytest.fixture
def ends(cut):
    ours, theirs = socket.socketpair()
    link = Link(ours, cut)
    with theirs:
        yield link, theirs
    link.close()


def test_what_follows_a_message_is_left_for_whoever_reads_next(ends):
    link, theirs = ends
    theirs.sendall(encode_message(Ready()) + b"rest")

    assert link.receive(Ready) == Ready()
    assert os.read(link.fileno(), 10) == b"rest"


def test_message_in_pieces_is_whole(ends):
    link, theirs = ends
    raw = encode_message(Welcome(version=1))

    def drip():
        for byte in raw:
            theirs.sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    assert link.receive(Welcome) == Welcome(version=1)
    thread.join()


def test_silence_ends_by_the_deadline(ends):
    with pytest.raises(LinkTimeout, match=r"within 0\.05 s"):
        ends[0].receive(Done, timeout_s=0.05)


def test_dripping_does_not_put_the_deadline_off(ends):
    link, theirs = ends
    theirs.sendall(b"CV")

    with pytest.raises(LinkTimeout):
        link.receive(Done, timeout_s=0.05)


def test_who_takes_nothing_ends_the_sending(ends):
    with pytest.raises(LinkTimeout):
        for _ in range(100):
            ends[0].send(Refuse(reasons=["x" * 60_000]), timeout_s=0.05)


@pytest.mark.parametrize("sent", [b"", b"CVMg", b"CVMg\0\x07\0\0\0\0\0\x02{"])
def test_end_in_the_middle_is_told(ends, sent):
    link, theirs = ends
    theirs.sendall(sent)
    theirs.close()

    with pytest.raises(LinkDown):
        link.receive(Done)


def test_sending_to_nobody_is_told(ends):
    link, theirs = ends
    theirs.close()

    with pytest.raises(LinkDown):
        for _ in range(3):
            link.send(Done())


def test_cut_ends_who_waits_and_all_that_comes_later(ends, cut):
    threading.Timer(0.05, cut.now).start()

    with pytest.raises(Cancelled):
        ends[0].receive(Done, timeout_s=None)
    with pytest.raises(Cancelled):
        ends[0].send(Done())
    ends[0].send_last(Refuse(reasons=["The end"]))  # the one thing that can still be said
    assert ends[1].recv(4) == b"CVMg"


def test_cut_shuts_down_what_an_engine_works_with(ends, cut):
    ends[0].lend()
    ends[1].settimeout(HOST_S)
    cut.now()
    assert ends[1].recv(1) == b""


def test_refusal_that_waits_is_found(ends):
    link, theirs = ends
    theirs.sendall(encode_message(Refuse(reasons=["why"])))

    assert link.pending_refusal(timeout_s=1).reasons == ["why"]
    assert link.pending_refusal(timeout_s=0.01) is None


def test_reasons_of_somebody_else_are_lines_that_can_be_shown(ends):
    link, theirs = ends
    theirs.sendall(encode_message(Refuse(reasons=["no\n\x1b[31mERROR", "y" * 5000, *["z"] * 100])))

    with pytest.raises(PeerRefused) as caught:
        link.receive(Hello)

    reasons = caught.value.reasons
    assert (reasons[0], len(reasons[1]), len(reasons)) == ("no??[31mERROR", 1000, 32)


@pytest.fixture
def listener(cut, tmp_path):
    listener = Listener(UnixAddress(f"{tmp_path}/m"), cut)
    yield listener
    listener.close()


def test_listener_removes_its_socket(listener, tmp_path):
    assert os.path.exists(f"{tmp_path}/m")
    listener.close()
    listener.close()
    assert not os.path.exists(f"{tmp_path}/m")


def test_who_connects_is_greeted(listener, cut, tmp_path):
    source = connect(UnixAddress(f"{tmp_path}/m"), "control", cut)
    link = listener.accept_sender()
    greet(link)

    assert source.receive(Welcome) == Welcome(version=1)
    source.close()
    link.close()


def test_state_before_control_is_refused(listener, cut, tmp_path):
    source = connect(UnixAddress(f"{tmp_path}/m"), "state", cut, token="t")
    link = listener.accept_sender()

    with pytest.raises(ProtocolError, match="opened a connection for 'state' first"):
        greet(link)
    source.close()
    link.close()


def test_cut_ends_who_waits_for_a_sender(listener, cut):
    threading.Timer(0.05, cut.now).start()

    with pytest.raises(Cancelled):
        listener.accept_sender()


def test_who_is_about_to_listen_is_waited_for(cut, tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        timer = threading.Timer(0.05, listener.listen)
        timer.start()

        connect(UnixAddress(str(tmp_path / "socket")), "control", cut).close()

        timer.join()


def test_path_where_nobody_listens_any_more_is_refused(cut, tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))

    with pytest.raises(ConnectFailed, match="Error connecting to UNIX socket"):
        connect(UnixAddress(str(tmp_path / "socket")), "control", cut)


@pytest.mark.parametrize("length", [200, 5000])
def test_path_that_is_too_long_is_refused_both_ways(cut, length):
    address = UnixAddress("/" + "x" * length)
    with pytest.raises(ListenFailed, match="Error binding to UNIX socket"):
        Listener(address, cut)
    with pytest.raises(ConnectFailed, match="Error connecting to UNIX socket"):
        connect(address, "control", cut)


def test_host_that_does_not_exist_is_refused_both_ways(cut):
    address = TcpAddress("256.256.256.256.invalid", 1)
    with pytest.raises(ListenFailed, match="Error binding to TCP socket"):
        Listener(address, cut)
    with pytest.raises(ConnectFailed, match="Error connecting to TCP socket"):
        connect(address, "control", cut)


def test_port_that_is_taken_is_refused(cut):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ListenFailed) as caught:
            Listener(TcpAddress("127.0.0.1", taken.getsockname()[1]), cut)
    assert caught.value.__cause__.errno == 98


def test_listener_leaves_a_file_that_exists_alone(cut, tmp_path):
    path = tmp_path / "m"
    path.write_text("mine")

    with pytest.raises(ListenFailed):
        Listener(UnixAddress(str(path)), cut)
    assert path.read_text() == "mine"


def test_hello_at_the_limit_arrives(ends):
    link, theirs = ends
    theirs.sendall(encode_message(Hello(program="p", versions=[1], role="x" * 60_000)))

    assert len(link.receive(Hello).role) == 60_000
