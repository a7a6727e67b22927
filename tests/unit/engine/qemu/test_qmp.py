"""The QMP client against a scripted peer on a socket pair."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from cloudvmm.engine.base import EngineTimeout, MachineGone
from cloudvmm.engine.qemu.codec import QmpGarbage
from cloudvmm.engine.qemu.qmp import MAX_KEPT_EVENTS, QmpClient, QmpError, offer_handshake

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": []}}\r\n'
LONG_S = 20.0
SHORT_S = 0.05


class Peer:
    """QEMU's end: reads commands and says what it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(LONG_S)
        self._buffer = b""
        self.fds: list[int] = []

    def read(self) -> dict:
        while b"\n" not in self._buffer:
            data, fds, _, _ = socket.recv_fds(self.sock, 65536, 4)
            assert data, "The client hung up"
            self._buffer += data
            self.fds += fds
        line, _, self._buffer = self._buffer.partition(b"\n")
        return msgspec.json.decode(line)

    def say(self, **message: object) -> None:
        message = {name.rstrip("_"): value for name, value in message.items()}
        self.sock.sendall(msgspec.json.encode(message) + b"\r\n")

    def answer(self, value: object = None) -> dict:
        command = self.read()
        self.say(return_=value or {}, id=command["id"])
        return command

    def greet(self) -> None:
        self.sock.sendall(GREETING)
        assert self.answer()["execute"] == "qmp_capabilities"


@pytest.fixture
def pair() -> Iterator[tuple[QmpClient, Peer]]:
    near, far = socket.socketpair()
    offer_handshake(near)
    client = QmpClient(near)
    with far:
        yield client, Peer(far)
    client.close()


@pytest.fixture
def client(pair) -> QmpClient:
    return pair[0]


@pytest.fixture
def peer(pair) -> Peer:
    return pair[1]


@pytest.fixture
def talking(client, peer) -> QmpClient:
    peer.greet()
    client.handshake(timeout_s=LONG_S)
    return client


@pytest.fixture
def beside() -> Iterator[Callable[..., threading.Thread]]:
    """Run functions beside the test; all are joined at its end."""
    threads = []

    def start(function, *arguments):
        thread = threading.Thread(target=function, args=arguments)
        threads.append(thread)
        thread.start()
        return thread

    yield start
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()


def test_handshake_gives_the_version(client, peer):
    peer.greet()

    assert client.handshake(timeout_s=LONG_S) == (10, 0, 2)


def test_handshake_without_a_greeting_is_garbage(client, peer):
    peer.say(return_={}, id=0)

    with pytest.raises(QmpGarbage):
        client.handshake(timeout_s=LONG_S)


def test_execute_returns_what_qemu_returns(talking, peer, beside):
    beside(peer.answer, {"status": "running"})

    assert talking.execute("query-status", timeout_s=LONG_S) == {"status": "running"}


def test_arguments_reach_qemu_and_the_observer(peer, beside):
    near, far = socket.socketpair()
    seen = []
    client = QmpClient(near, observe=lambda command, arguments: seen.append((command, arguments)))
    with near, far:
        heard = []
        other = Peer(far)
        answering = beside(lambda: heard.append(other.answer()))
        client.execute("getfd", {"fdname": "core"}, timeout_s=LONG_S)
        answering.join(LONG_S)

    assert seen == [("getfd", {"fdname": "core"})]
    assert heard[0]["arguments"] == {"fdname": "core"}


def test_descriptors_go_beside_the_command(talking, peer, beside):
    with open("/dev/null", "rb") as file:
        beside(peer.answer)
        talking.execute("getfd", {"fdname": "core"}, fds=[file.fileno()], timeout_s=LONG_S)
        same = os.path.samestat(os.fstat(file.fileno()), os.fstat(peer.fds[0]))
    os.close(peer.fds[0])

    assert same


def test_urgent_command_is_out_of_band_where_that_was_agreed(beside):
    near, far = socket.socketpair()
    offer_handshake(near, has_urgent=True)
    client = QmpClient(near)
    heard = []
    with far, contextlib.closing(client):
        other = Peer(far)
        far.sendall(GREETING)
        answering = beside(lambda: heard.extend([other.answer(), other.answer()]))
        client.handshake(timeout_s=LONG_S)
        client.execute("migrate-pause", is_urgent=True, timeout_s=LONG_S)
        answering.join(LONG_S)

    assert heard[0]["arguments"] == {"enable": ["oob"]}
    assert heard[1] == {"exec-oob": "migrate-pause", "id": heard[1]["id"]}


def test_refusal_carries_command_class_and_words(talking, peer, beside):
    def refuse():
        command = peer.read()
        peer.say(error={"class": "DeviceNotFound", "desc": "Device 'x' not found"}, id=command["id"])

    beside(refuse)

    with pytest.raises(QmpError, match="Device 'x' not found") as caught:
        talking.execute("device_del", {"id": "x"}, timeout_s=LONG_S)
    assert (caught.value.command, caught.value.error_class) == ("device_del", "DeviceNotFound")


def test_events_between_replies_are_kept_in_order(talking, peer, beside):
    def answer():
        peer.say(event="STOP")
        peer.say(event="RESUME")
        peer.answer()

    beside(answer)
    talking.execute("stop", timeout_s=LONG_S)

    assert [event.name for event in talking.poll_events()] == ["STOP", "RESUME"]
    assert talking.poll_events() == []


def test_kept_events_are_bounded(talking, peer, beside):
    def answer():
        for _ in range(MAX_KEPT_EVENTS + 10):
            peer.say(event="RTC_CHANGE")
        peer.answer()

    beside(answer)
    talking.execute("stop", timeout_s=LONG_S)

    assert len(talking.poll_events()) == MAX_KEPT_EVENTS


def test_execute_until_awaits_the_event_that_follows(talking, peer, beside):
    peer.say(event="DUMP_COMPLETED", data={"stale": True})

    def dump():
        peer.answer()
        peer.say(event="STOP")
        peer.say(event="DUMP_COMPLETED", data={"result": {"status": "completed"}})

    assert talking.poll_events() != []
    beside(dump)
    done = talking.execute_until("dump-guest-memory", event="DUMP_COMPLETED", timeout_s=LONG_S)

    assert done.data == {"result": {"status": "completed"}}


def test_execute_until_passes_by_events_that_are_not_the_last(talking, peer, beside):
    def migrate():
        peer.answer()
        for status in ("setup", "active", "completed"):
            peer.say(event="MIGRATION", data={"status": status})
            # The control loop looks now and then, and would take what the worker waits for.
            assert talking.poll_events() == []

    beside(migrate)
    done = talking.execute_until(
        "migrate",
        event="MIGRATION",
        timeout_s=LONG_S,
        is_last=lambda event: event.data["status"] == "completed",
    )

    assert done.data == {"status": "completed"}


def test_execute_until_looks_whether_to_go_on_and_the_look_may_ask(talking, peer, beside):
    def answer():
        peer.answer()
        peer.answer({"status": "active"})
        peer.say(event="MIGRATION", data={"status": "completed"})

    looks = []
    beside(answer)
    done = talking.execute_until(
        "migrate",
        event="MIGRATION",
        timeout_s=LONG_S,
        check=lambda: looks.append(talking.execute("query-migrate", timeout_s=LONG_S)),
    )

    assert (looks, done.data) == ([{"status": "active"}], {"status": "completed"})


def test_look_that_fails_ends_the_waiting(talking, peer, beside):
    def end():
        raise MachineGone("ended")

    beside(peer.answer)
    with pytest.raises(MachineGone, match="ended"):
        talking.execute_until("migrate", event="MIGRATION", timeout_s=LONG_S, check=end)


def test_silence_is_a_timeout_and_the_late_answer_is_dropped(talking, peer, beside):
    with pytest.raises(EngineTimeout):
        talking.execute("stop", timeout_s=SHORT_S)
    beside(lambda: (peer.answer({"late": True}), peer.answer({"own": True})))

    assert talking.execute("query-status", timeout_s=LONG_S) == {"own": True}


@pytest.mark.parametrize("answer", [{"return_": {}}, {"error": {"class": "GenericError", "desc": "No"}}])
def test_what_is_told_goes_out_at_once_and_its_answer_is_dropped(talking, peer, beside, answer):
    talking.tell([("block-latency-histogram-set", {"id": disk}) for disk in ("one", "two")])
    told = [peer.read(), peer.read()]
    assert [each["arguments"]["id"] for each in told] == ["one", "two"]

    for each in told:
        peer.say(**answer, id=each["id"])
    beside(peer.answer, {"own": True})
    assert talking.execute("query-status", timeout_s=LONG_S) == {"own": True}


def test_half_a_line_is_a_timeout(talking, peer):
    peer.sock.sendall(b'{"return": {')

    with pytest.raises(EngineTimeout):
        talking.execute("stop", timeout_s=SHORT_S)


def test_half_a_line_and_then_the_end_is_the_end(talking, peer):
    peer.sock.sendall(b'{"return": {')
    peer.sock.shutdown(socket.SHUT_WR)

    with pytest.raises(MachineGone):
        talking.execute("stop", timeout_s=LONG_S)


def test_garbage_is_an_error_at_once(talking, peer):
    peer.sock.sendall(b"qemu: fatal\n")

    with pytest.raises(QmpGarbage):
        talking.execute("stop", timeout_s=LONG_S)


def test_peer_that_closed_is_gone(talking, peer):
    peer.sock.close()

    with pytest.raises(MachineGone):
        talking.execute("stop", timeout_s=LONG_S)


def test_peer_that_takes_nothing_is_a_timeout(talking):
    with pytest.raises(EngineTimeout):
        talking.execute("stop", {"padding": "x" * 4_000_000}, timeout_s=SHORT_S)


def test_abort_ends_a_call_that_waits(talking, peer, beside):
    def abort():
        peer.read()
        talking.abort()

    beside(abort)
    before = time.monotonic()

    with pytest.raises(MachineGone):
        talking.execute("stop", timeout_s=LONG_S)
    assert time.monotonic() - before < LONG_S / 2


def test_after_abort_every_call_fails(talking):
    talking.abort()
    talking.abort()

    with pytest.raises(MachineGone):
        talking.execute("stop", timeout_s=LONG_S)


def test_poll_events_gives_the_last_events_before_the_end(talking, peer):
    peer.say(event="SHUTDOWN")
    peer.sock.close()

    assert [event.name for event in talking.poll_events()] == ["SHUTDOWN"]
    with pytest.raises(MachineGone):
        talking.poll_events()


def test_poll_events_does_not_wait_for_a_command_under_way(talking, peer, beside):
    under_way = beside(talking.execute, "stop")
    command = peer.read()

    assert talking.poll_events() == []
    peer.say(return_={}, id=command["id"])
    under_way.join(LONG_S)


def test_command_that_gets_no_turn_in_time_leaves_the_conversation_whole(talking, peer, beside):
    under_way = beside(talking.execute, "query-blockstats")
    command = peer.read()

    with pytest.raises(EngineTimeout, match="still busy"):
        talking.execute("query-pci", timeout_s=SHORT_S)

    peer.say(return_={}, id=command["id"])
    under_way.join(LONG_S)
    beside(peer.answer, {"status": "running"})
    assert talking.execute("query-status", timeout_s=LONG_S) == {"status": "running"}
