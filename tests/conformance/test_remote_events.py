"""`cloudvmm-remote events`: one line per event, of a real server and of streams that follow a script."""

import json
import signal
import subprocess

import pytest

from support.deadline import HOST_S
from support.peer import Peer
from support.remote import Remote
from support.server import Server

HEAD = b"HTTP/1.1 200 \r\nContent-Type: text/event-stream\r\n\r\n"
FIRST = '{"number":1,"source":"vm","event":"booting"}'
SECOND = '{"number":2,"source":"vm","event":"booted"}'


def frame(name, data):
    return f"event: {name}\ndata: {data}\n\n".encode()


def playing(*pieces):
    """Play a stream; remember what was asked."""
    asked = []

    def script(talk):
        asked.append(talk.read_request().split(b" ")[1].decode())
        for piece in pieces:
            talk.send(piece)

    return asked, script


@pytest.fixture
def remote(tmp_path, socket_path):
    return Remote(tmp_path, "--api-socket", socket_path)


def test_each_event_is_a_line(remote, socket_path):
    asked, script = playing(
        HEAD, b":\n\n" + frame("vm/booting", FIRST)[:20], frame("vm/booting", FIRST)[20:],
        frame("vm/booted", SECOND) + frame("end", '{"next":3}'),
    )  # fmt: skip
    with Peer(socket_path, script):
        outcome = remote("events")
    assert outcome == (0, f"{FIRST}\n{SECOND}\n", "")
    assert asked == ["/api/v1/vm.events"]


def test_a_life_is_told_to_its_end(tmp_path):
    server = Server(tmp_path / "server", ["--engine", "fake"])
    try:
        server.wait_ready()
        remote = Remote(tmp_path, "--api-socket", server.socket_path)
        with subprocess.Popen(
            [str(remote.path), "--api-socket", server.socket_path, "events", "--from", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            config = {"payload": {"kernel": "/bin/sh"}, "console": {"mode": "Off"}}
            assert remote("create", stdin=json.dumps(config).encode()).status == 0
            assert [remote(name).status for name in ("boot", "pause", "delete", "shutdown-vmm")] == [0] * 4
            out, err = process.communicate(timeout=30)
    finally:
        server.check_end()
    events = [json.loads(line) for line in out.splitlines()]
    assert (process.returncode, err) == (0, b"")
    names = [f"{event['source']}/{event['event']}" for event in events]
    assert [name for name in names if name in ("vmm/starting", "vm/booted", "vm/paused", "vmm/shutdown")] == [
        "vmm/starting",
        "vm/booted",
        "vm/paused",
        "vmm/shutdown",
    ]
    assert [event["number"] for event in events] == list(
        range(events[0]["number"], len(events) + events[0]["number"])
    )


def test_a_number_to_begin_with_is_asked_for(remote, socket_path):
    asked, script = playing(HEAD, frame("end", '{"next":3}'))
    with Peer(socket_path, script):
        assert remote("events", "--from", "0") == (0, "", "")
    assert asked == ["/api/v1/vm.events?from=0"]


def test_a_gap_is_told_beside_the_events(remote, socket_path):
    gap = '{"requested":0,"first":2}'
    _, script = playing(HEAD, frame("gap", gap) + frame("vm/booted", SECOND), frame("end", "{}"))
    with Peer(socket_path, script):
        outcome = remote("events", "--from", "0")
    assert outcome == (0, f"{SECOND}\n", f"warning: Some events are no longer kept: {gap}\n")


def test_a_stream_that_breaks_off_is_an_error(remote, socket_path):
    _, script = playing(HEAD, frame("vm/booting", FIRST))
    with Peer(socket_path, script):
        outcome = remote("events")
    assert (outcome.status, outcome.out) == (1, f"{FIRST}\n")
    assert outcome.chain()[:2] == ["http client error", "Error writing to or reading from HTTP socket"]


def test_a_server_without_events_refuses(remote, socket_path):
    body = b'["Not Found"]'
    _, script = playing(b"HTTP/1.1 404 \r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    with Peer(socket_path, script):
        outcome = remote("events")
    assert outcome.status == 1
    assert outcome.chain() == ["http client error", "Server responded with NotFound", "Not Found"]


def test_a_key_ends_it(remote, socket_path):
    def script(talk):
        talk.read_request()
        talk.send(HEAD + frame("vm/booting", FIRST))
        assert talk.wait_closed()

    with Peer(socket_path, script):
        process = subprocess.Popen(
            [str(remote.path), "--api-socket", socket_path, "events"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Who runs us in the background has us ignore it, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        with process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == f"{FIRST}\n".encode()
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(HOST_S) == 130
            finally:
                process.kill()
            assert process.stderr.read() == b""
