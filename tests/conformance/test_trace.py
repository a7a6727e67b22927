"""`--trace` of a server on the fake engine: the file parses, spans nest, and the pieces of a start add up."""

from __future__ import annotations

import json

import pytest

from support.deadline import HOST_S
from support.server import Server
from support.trace import Trace
from support.wait import wait_until

CONFIG = {"payload": {"kernel": "/vmlinux"}, "console": {"mode": "Null"}}
PIECES = ["interpreter", "flags", "imports", "threads and socket"]


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path / "server", ["--engine", "fake", "--trace", str(tmp_path / "trace.json")])
    server.wait_ready()
    yield server
    server.check_end()


def test_start_is_the_sum_of_its_pieces(server, tmp_path):
    server.vmm.put("vmm.shutdown")
    server.wait_end()
    trace = Trace(tmp_path / "trace.json")
    start = trace.one("start")
    pieces = sorted(trace.inside(start), key=lambda span: span.begun_us)
    assert [piece.name for piece in pieces] == PIECES
    assert sum(piece.took_us for piece in pieces) == pytest.approx(start.took_us, abs=1)


def test_commands_are_spans_that_hold_what_they_are_made_of(server, tmp_path):
    serial = {"mode": "File", "file": str(tmp_path / "serial")}
    server.vmm.put("vm.create", {**CONFIG, "serial": serial})
    server.vmm.put("vm.resume", expect=500)
    server.vmm.get("vm.info")
    server.vmm.put("vmm.shutdown")
    server.wait_end()
    trace = Trace(tmp_path / "trace.json")
    assert trace.tangled() == []
    create, consoles = map(trace.one, ("PUT vm.create", "open consoles"))
    assert consoles.row == "vm-worker"
    assert create.holds(consoles)
    assert create.holds(trace.one("take vm.create"))
    assert trace.one("PUT vm.resume").took_us > 0
    assert trace.one("GET vm.info").row == "http-connection"


def test_trace_of_a_killed_server_can_be_opened(server, tmp_path):
    wait_until(lambda: '"start"' in (tmp_path / "trace.json").read_text(), "it is up", timeout_s=HOST_S)
    server.vmm.put("vm.create", CONFIG)
    server.keep("api")
    server.kill()
    server.wait_end()
    lines = (tmp_path / "trace.json").read_text().rstrip(",\n")
    names = {event["name"] for event in json.loads(f"{lines}]")}
    assert {"start", "PUT vm.create"} <= names
