"""`vm.events`: server-sent events with numbers, replay, and any number of readers (docs/events.md)."""

import http.client
import os
import resource
import shutil
import socket
import subprocess
import threading

import msgspec
import pytest

from cloudvmm.events.hub import EventHub
from cloudvmm.http import start_http_path_thread
from cloudvmm.http.stream import STALL_S, Stream
from support.deadline import HOST_S
from support.rest import RestClient, request_bytes
from support.wait import wait_until
from support.watch import Watch

TIMEOUT_S = HOST_S
PATH = "/api/v1/vm.events"
HEAD = (
    b"HTTP/1.1 200 \r\nServer: Cloud Hypervisor API\r\nConnection: close\r\n"
    b"Content-Type: text/event-stream\r\nCache-Control: no-store\r\n\r\n"
)


class Frame(msgspec.Struct, frozen=True):
    event: str
    data: dict
    id: int | None = None


class Reader:
    """One stream's client."""

    def __init__(self, path, target=PATH, *headers):
        self.client = socket.socket(socket.AF_UNIX)
        self.client.settimeout(TIMEOUT_S)
        self.client.connect(path)
        lines = [f"GET {target} HTTP/1.1", "Host: localhost", *headers, "", ""]
        self.client.sendall("\r\n".join(lines).encode())
        self.left = b""

    def head(self):
        return self.until(b"\r\n\r\n")

    def frame(self):
        """Return the next frame; comments, and what says the place alone, are passed over."""
        while b"data: " not in (block := self.until(b"\n\n")):
            pass
        fields = dict(line.split(": ", 1) for line in block.decode().strip().split("\n"))
        number = fields.get("id")
        return Frame(
            event=fields["event"],
            data=msgspec.json.decode(fields["data"]),
            id=None if number is None else int(number),
        )

    def frames(self, count):
        return [self.frame() for _ in range(count)]

    def until(self, mark):
        while mark not in self.left:
            piece = self.client.recv(65536)
            assert piece, f"The stream ended after {self.left!r}"
            self.left += piece
        block, _, self.left = self.left.partition(mark)
        return block + mark

    def is_at_end(self):
        return self.left == b"" and self.client.recv(1) == b""

    def close(self):
        self.client.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def hub():
    return EventHub()


@pytest.fixture
def server(vmm, socket_path, hub):
    running = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub)
    yield running
    running.close(deadline_s=2.0)


def emit(hub, count):
    for _ in range(count):
        hub.emit("vm", "pausing")


def ids(frames):
    return [frame.id for frame in frames]


def test_stream_is_laid_out_exactly(vmm, socket_path):
    clock = iter([0, 1_250_000_000]).__next__
    hub = EventHub(clock)
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub)
    with Reader(socket_path) as reader:
        assert reader.head() == HEAD
        hub.emit("virtio-device", "activated", {"id": "_disk0"})
        assert reader.until(b"\n\n") == (
            b"id: 0\nevent: virtio-device/activated\n"
            b'data: {"number":0,"timestamp":{"secs":1,"nanos":250000000},'
            b'"source":"virtio-device","event":"activated","properties":{"id":"_disk0"}}\n\n'
        )
    assert server.close(deadline_s=HOST_S)


def test_without_a_number_what_comes_next_is_sent(server, socket_path, hub):
    emit(hub, 3)
    with Reader(socket_path) as reader:
        reader.head()
        emit(hub, 2)
        assert ids(reader.frames(2)) == [3, 4]


def test_without_a_number_the_place_is_told_first(server, socket_path, hub):
    emit(hub, 3)
    with Reader(socket_path) as reader:
        reader.head()
        assert reader.until(b"\n\n") == b"id: 2\n\n"
        assert reader.left == b""


def test_from_replays_what_was(server, socket_path, hub):
    emit(hub, 5)
    with Reader(socket_path, f"{PATH}?from=2") as reader:
        reader.head()
        emit(hub, 1)
        assert ids(reader.frames(4)) == [2, 3, 4, 5]


def test_last_event_id_goes_on_behind_it_and_wins_over_from(server, socket_path, hub):
    emit(hub, 5)
    with Reader(socket_path, f"{PATH}?from=0", "last-event-id:  3 ") as reader:
        reader.head()
        assert ids(reader.frames(1)) == [4]


def test_empty_last_event_id_is_none(server, socket_path, hub):
    emit(hub, 2)
    with Reader(socket_path, f"{PATH}?from=0", "Last-Event-ID: ") as reader:
        reader.head()
        assert ids(reader.frames(2)) == [0, 1]


def test_who_is_up_to_date_gets_no_gap(server, socket_path, hub):
    emit(hub, 5)
    with Reader(socket_path, PATH, "Last-Event-ID: 4") as reader:
        reader.head()
        emit(hub, 1)
        assert ids(reader.frames(1)) == [5]


def test_what_is_kept_no_longer_is_told_as_a_gap_first(vmm, socket_path):
    hub = EventHub(kept=10)
    emit(hub, 25)
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub)
    with Reader(socket_path, f"{PATH}?from=3") as reader:
        reader.head()
        assert reader.frame() == Frame(event="gap", data={"requested": 3, "first": 15})
        assert ids(reader.frames(10)) == list(range(15, 25))
    assert server.close(deadline_s=HOST_S)


def test_number_from_before_this_vmm_is_told_as_a_gap(server, socket_path, hub):
    emit(hub, 2)
    with Reader(socket_path, PATH, "Last-Event-ID: 99") as reader:
        reader.head()
        assert reader.frame() == Frame(event="gap", data={"requested": 100, "first": 0})
        assert ids(reader.frames(2)) == [0, 1]


@pytest.mark.parametrize(
    ("method", "target", "header", "code"),
    [
        ("GET", "?from=", "", "BadQuery"),
        ("GET", "?from=-1", "", "BadQuery"),
        ("GET", "?from=1.0", "", "BadQuery"),
        ("GET", "?from=٣", "", "BadQuery"),
        ("GET", f"?from={2**64}", "", "BadQuery"),
        ("GET", "?from=1&to=2", "", "BadQuery"),
        ("GET", "?", "", "BadQuery"),
        ("GET", "?until=1", "", "BadQuery"),
        ("GET", "", "Last-Event-ID: x", "BadQuery"),
        ("PUT", "", "", "WrongMethod"),
        ("DELETE", "?from=1", "", "WrongMethod"),
    ],
)
def test_bad_request_for_a_stream_is_refused_and_the_connection_stays(client, method, target, header, code):
    client.send(f"{method} {PATH}{target} HTTP/1.1\r\n{header or 'Host: x'}\r\n\r\n".encode())
    reply = client.reply()
    assert (reply.status, reply.code, reply.body) == (400, code, b'["Bad Request"]')
    assert client.ping().status == 200


@pytest.mark.parametrize("target", [PATH + "/", PATH + "x", "/api/v1/vm.info?from=1", "/api/v1/vmm.ping?x"])
def test_other_paths_have_no_query(client, target):
    client.send(request_bytes("GET", target))
    assert client.reply().status == 404


def test_without_a_hub_there_is_no_such_path(vmm, socket_path):
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    with RestClient(socket_path, is_documented=False) as client:  # a whole server has one
        reply = client.ask("GET", "vm.events")
        assert (reply.status, reply.code) == (404, "NotFound")
    assert server.close(deadline_s=HOST_S)


def test_streams_take_no_place_of_a_connection(server, socket_path, hub):
    readers = [Reader(socket_path) for _ in range(40)]
    for reader in readers:
        reader.head()
    clients = [RestClient(socket_path) for _ in range(10)]
    assert [client.ping().status for client in clients] == [200] * 10
    hub.emit("vm", "booted")
    assert [reader.frame().id for reader in readers] == [0] * 40
    assert (server.stream_count, server.connection_count) == (40, 10)
    for one in (*readers, *clients):
        one.close()
    wait_until(lambda: not server.stream_count, "the streams' end", timeout_s=HOST_S)


def test_stream_too_many_is_refused_until_one_has_ended(vmm, socket_path, hub):
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub, max_streams=2)
    with Reader(socket_path) as first, Reader(socket_path) as second, RestClient(socket_path) as third:
        first.head()
        second.head()
        reply = third.ask("GET", "vm.events")
        assert (reply.status, reply.code, reply.texts()) == (
            503,
            "TooManyStreams",
            ["Too many open event streams"],
        )
        first.close()
        wait_until(lambda: server.stream_count == 1, "the stream's end", timeout_s=HOST_S)
        with Reader(socket_path) as fourth:
            assert fourth.head() == HEAD
    assert server.close(deadline_s=HOST_S)


def test_stream_that_the_process_has_no_descriptor_for_is_refused(server, socket_path, hub):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with RestClient(socket_path) as client:
        client.ping()
        lowest_free = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            reply = client.ask("GET", "vm.events")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (reply.status, reply.code, reply.texts()) == (
            503,
            "TooManyStreams",
            ["Too many open event streams", "Too many open files (os error 24)"],
        )
        assert client.ping().status == 200
    assert server.stream_count == 0


def test_client_that_leaves_is_noticed_without_an_event(server, socket_path):
    with Reader(socket_path) as reader:
        reader.head()
        assert server.stream_count == 1
    wait_until(lambda: server.stream_count == 0, "the stream's end", timeout_s=HOST_S)


def test_client_that_says_no_more_still_reads(server, socket_path, hub):
    with Reader(socket_path) as reader:
        reader.head()
        reader.client.sendall(b"this is not looked at\r\n\r\n")
        reader.client.shutdown(socket.SHUT_WR)
        emit(hub, 2)
        assert ids(reader.frames(2)) == [0, 1]
        assert server.stream_count == 1


def test_end_sends_what_has_happened_and_says_that_it_is_all(vmm, socket_path, hub):
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub)
    with Reader(socket_path) as reader, Reader(socket_path, f"{PATH}?from=0") as late:
        reader.head()
        late.head()
        hub.emit("vm", "deleted")
        hub.emit("vmm", "shutdown")
        assert server.close(deadline_s=HOST_S)
        for one in (reader, late):
            assert [frame.event for frame in one.frames(3)] == ["vm/deleted", "vmm/shutdown", "end"]
            assert one.is_at_end()


def test_end_carries_the_number_that_will_not_come(vmm, socket_path, hub):
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub)
    emit(hub, 7)
    with Reader(socket_path) as reader:
        reader.head()
        assert server.close(deadline_s=HOST_S)
        assert reader.frame() == Frame(event="end", data={"next": 7})


def test_reader_that_takes_nothing_delays_neither_emitter_nor_others_nor_the_end(vmm, socket_path):
    hub = EventHub(kept=100)
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub)
    with Reader(socket_path) as stuck, Reader(socket_path) as quick:
        stuck.head()
        quick.head()
        with Watch() as watch:
            for _ in range(200):
                for _ in range(50):
                    hub.emit("vm", "pausing", {"id": "x" * 100})
                while quick.frame().data.get("number", -1) < hub.next_number - 1:
                    pass
        assert watch.elapsed_s < STALL_S / 2
        first = stuck.frame()
        numbers = [first.id]
        while "gap" not in numbers:
            frame = stuck.frame()
            numbers.append("gap" if frame.event == "gap" else frame.id)
        assert numbers[:-1] == list(range(len(numbers) - 1))
        after = stuck.frame()
        assert after.id == frame.data["first"] > frame.data["requested"] == len(numbers) - 1
        assert server.close(deadline_s=HOST_S)


def test_stuck_reader_is_cut_at_the_end(vmm, socket_path, hub):
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub)
    with Reader(socket_path) as stuck:
        stuck.head()
        for _ in range(4000):
            hub.emit("vm", "pausing", {"id": "x" * 200})
        with Watch() as watch:
            assert not server.close(deadline_s=0.2)
        assert watch.elapsed_s < 3


def run_stream(hub, **options):
    """Return the far end of a stream, its thread, what it raised, and what ends it."""
    near, far = socket.socketpair()
    far.settimeout(TIMEOUT_S)
    raised, ending = [], threading.Event()

    def run():
        with near:
            try:
                Stream(near, hub, ending=ending, **options).run(None)
            except OSError as error:
                raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return far, thread, raised


def test_quiet_stream_is_kept_alive_by_comments(hub):
    far, thread, _ = run_stream(hub, keep_alive_s=0.02)
    with far, far.makefile("rb") as file:
        assert file.read(len(HEAD) + 6) == HEAD + b":\n\n:\n\n"
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


def test_reader_that_takes_nothing_for_long_is_let_go(hub):
    far, thread, raised = run_stream(hub, stall_s=0.2)
    with far:
        assert far.recv(len(HEAD)) == HEAD
        for _ in range(4000):
            hub.emit("vm", "pausing", {"id": "x" * 200})
        thread.join(TIMEOUT_S)
    assert [type(error) for error in raised] == [TimeoutError]


def test_python_s_client_reads_the_stream(server, socket_path, hub):
    connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(TIMEOUT_S)
    connection.sock.connect(socket_path)
    connection.request("GET", f"{PATH}?from=0")
    response = connection.getresponse()
    hub.emit("vm", "booted")
    assert (response.status, response.headers["Content-Type"]) == (200, "text/event-stream")
    assert [response.readline() for _ in range(2)] == [b"id: 0\n", b"event: vm/booted\n"]
    response.close()
    connection.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing (apt install curl)")
def test_curl_reads_the_stream_and_its_clean_end(vmm, socket_path, hub):
    server = start_http_path_thread(socket_path, vmm.event, vmm.sender, events=hub)
    emit(hub, 1)
    curl = subprocess.Popen(
        ["curl", "-sN", "--max-time", "60", "--unix-socket", socket_path, f"http://localhost{PATH}?from=0"],
        stdout=subprocess.PIPE,
    )
    assert curl.stdout.readline() == b"id: 0\n"
    assert server.close(deadline_s=HOST_S)
    rest, _ = curl.communicate(timeout=HOST_S)
    assert (curl.returncode, rest.split(b"\n\n")[-2].split(b"\n")[0]) == (0, b"event: end")
