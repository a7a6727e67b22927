"""The clients on a server's event stream: order, replay, gaps, losses, the end."""

import asyncio
import contextlib
import threading

import pytest

from cloudvmm import client
from cloudvmm.events.hub import EventHub
from cloudvmm.http import start_http_path_thread
from support.deadline import HOST_S
from support.peer import Peer, Talk


@pytest.fixture
def hub():
    return EventHub(kept=4)


@pytest.fixture
def server(vmm, hub, socket_path):
    running = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub)
    yield running
    running.close(deadline_s=2.0)


class Follows:
    """A stream of one kind of client, spoken to by blocking."""

    def __init__(self, runner, made, from_number):
        self._runner = runner
        self._made = made
        self._stream = made.events(from_number) if runner is None else runner.run(made.events(from_number))

    def next(self, timeout_s=HOST_S):
        return self._wait(self._stream.next(timeout_s))

    def names(self):
        found = []
        while (event := self.next()) is not None:
            found.append(f"{event.source}/{event.event}")
        return found

    def wait_for(self, source, event, timeout_s=HOST_S):
        return self._wait(self._stream.wait_for(source, event, timeout_s))

    def close(self):
        self._stream.close()
        self._made.close()

    def _wait(self, outcome):
        return outcome if self._runner is None else self._runner.run(outcome)


@pytest.fixture(params=["blocking", "asyncio"])
def follow(request, socket_path):
    """`follow(from_number)` opens a stream; all are closed after the test."""
    with contextlib.ExitStack() as ending:
        runner, kind = None, client.Client
        if request.param == "asyncio":
            runner, kind = ending.enter_context(asyncio.Runner()), client.AsyncClient

        def opened(from_number=None):
            stream = Follows(runner, kind(socket_path), from_number)
            ending.callback(stream.close)
            return stream

        yield opened


def test_events_come_as_they_happen(server, hub, follow):
    stream = follow()
    hub.emit("vm", "booted")
    hub.emit("vm", "device-removed", {"id": "d", "bdf": "0000:00:01.0"})

    assert stream.next().event == "booted"
    removed = stream.next()
    assert (removed.number, removed.properties) == (1, {"id": "d", "bdf": "0000:00:01.0"})
    assert removed.monotonic_ns > 0


def test_events_of_before_are_replayed(server, hub, follow):
    for name in ("one", "two", "three"):
        hub.emit("vm", name)

    stream = follow(1)

    assert [stream.next().event, stream.next().event] == ["two", "three"]


def test_stream_without_news_times_out_and_goes_on(server, hub, follow):
    stream = follow()
    with pytest.raises(TimeoutError):
        stream.next(timeout_s=0.03)
    hub.emit("vm", "booted")

    assert stream.next().event == "booted"


def test_lost_events_are_told(server, hub, follow):
    for number in range(6):
        hub.emit("vm", str(number))
    stream = follow(0)

    with pytest.raises(client.EventsLost) as caught:
        stream.next()
    assert (caught.value.requested, caught.value.first) == (0, 2)
    assert stream.next().number == 2


def test_end_of_the_server_ends_the_stream(server, hub, follow):
    stream = follow()
    hub.emit("vmm", "shutdown")
    server.close()

    assert stream.names() == ["vmm/shutdown"]


def test_wait_for_passes_other_events_over(server, hub, follow):
    stream = follow()
    for name in ("pausing", "paused", "resuming"):
        hub.emit("vm", name)

    assert stream.wait_for("vm", "paused").number == 1
    assert stream.next().event == "resuming"


def test_wait_for_what_can_no_longer_come(server, hub, follow):
    stream = follow()
    server.close()

    with pytest.raises(TimeoutError, match="has ended without vm/booted"):
        stream.wait_for("vm", "booted")


def test_wait_for_event_from_the_beginning(server, hub, socket_path):
    hub.emit("vm", "booted")
    with client.Client(socket_path) as made:
        assert made.wait_for_event("vm", "booted", 5, from_number=0).number == 0


def test_event_that_does_not_come_is_named(server, socket_path):
    async def work():
        async with client.AsyncClient(socket_path) as made:
            await made.wait_for_event("vm", "booted", 0.05)

    with client.Client(socket_path) as made, pytest.raises(TimeoutError) as caught:
        made.wait_for_event("vm", "booted", 0.05)
    with pytest.raises(TimeoutError) as caught_by_task:
        asyncio.run(work())

    texts = [str(caught.value), str(caught_by_task.value)]
    assert texts == ["There was no vm/booted in 0.05 s"] * 2


def test_task_waits_for_an_event(server, hub, socket_path):
    hub.emit("vm", "booted")

    async def work():
        async with client.AsyncClient(socket_path) as made:
            return await made.wait_for_event("vm", "booted", 5, from_number=0)

    assert asyncio.run(work()).number == 0


def test_streams_are_iterators(server, hub, socket_path):
    hub.emit("vm", "booted")

    async def take_one(made):
        async with await made.events(0) as stream:
            return await anext(aiter(stream))

    with client.Client(socket_path) as made, made.events(0) as stream:
        assert next(iter(stream)).event == "booted"
    assert asyncio.run(take_one(client.AsyncClient(socket_path))).event == "booted"


def test_close_from_another_thread_ends_the_wait(server, hub, socket_path):
    stream = client.Client(socket_path).events(0)
    found = []
    thread = threading.Thread(target=lambda: found.append(stream.next(30)))
    thread.start()
    stream.close()
    thread.join(HOST_S)

    assert not thread.is_alive()
    assert found == [None]


HEAD = b"HTTP/1.1 200 \r\nConnection: close\r\nContent-Type: text/event-stream\r\n\r\n"


def frame(number):
    return (
        b'id: %d\nevent: vm/e\ndata: {"number":%d,"timestamp":{"secs":0,"nanos":1},"source":"vm",'
        b'"event":"e%d","properties":null}\n\n' % (number, number, number)
    )


def test_cut_stream_goes_on_where_it_was(socket_path, follow):
    asked = []

    def script(talk: Talk, pieces):
        asked.append(talk.read_request().split(b" ")[1])
        talk.send(HEAD + pieces)

    with Peer(
        socket_path,
        lambda talk: script(talk, frame(4) + frame(5)[:30]),
        lambda talk: script(talk, frame(5) + b'event: end\ndata: {"next":6}\n\n'),
    ):
        stream = follow(4)
        assert [stream.next().event, stream.next().event, stream.next()] == ["e4", "e5", None]

    assert asked == [b"/api/v1/vm.events?from=4", b"/api/v1/vm.events?from=5"]


def test_stream_that_is_cut_before_the_first_event_misses_none(socket_path, follow):
    asked = []

    def script(talk: Talk, pieces):
        asked.append(talk.read_request().split(b" ")[1])
        talk.send(HEAD + pieces)

    with Peer(socket_path, lambda talk: script(talk, b"id: 6\n\n"), lambda talk: script(talk, frame(7))):
        assert follow().next().number == 7

    assert asked == [b"/api/v1/vm.events", b"/api/v1/vm.events?from=7"]


def test_server_that_only_cuts_is_given_up(socket_path, follow):
    def script(talk: Talk):
        talk.read_request()
        talk.send(HEAD)

    with Peer(socket_path, script, script):
        stream = follow(0)
        with pytest.raises(client.NoAnswer):
            stream.next()


def test_server_that_is_gone_is_an_error(socket_path, follow):
    def script(talk: Talk):
        talk.read_request()
        talk.send(HEAD + frame(0))

    with Peer(socket_path, script):
        stream = follow(0)
        assert stream.next().number == 0
    with pytest.raises(client.ConnectionFailed):
        stream.next()
