"""One VMM's events in its monitor file, its log and its stream: the same, in the same order."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from support.booted import EventFile
from support.deadline import GUEST_S, HOST_S
from support.server import Server
from support.wait import wait_until


def follow(path: str) -> socket.socket:
    """Ask for every event since the start."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(HOST_S)
    client.connect(path)
    client.sendall(b"GET /api/v1/vm.events?from=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return client


def data_of(stream: bytes) -> list[dict[str, Any]]:
    _, _, frames = stream.partition(b"\r\n\r\n")
    lines = frames.decode().split("\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def read_all(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as file:
        return file.read()


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinux"
    path.write_bytes(b"kernel")
    return str(path)


def test_monitor_log_and_stream_tell_the_same(tmp_path: Path, kernel: str) -> None:
    monitor = EventFile(tmp_path / "events")
    server = Server(
        tmp_path / "server", ["--engine", "fake", "-v", "--event-monitor", f"path={monitor.path}"]
    )
    server.wait_ready()
    client = follow(server.socket_path)
    server.vmm.put("vm.create", {"payload": {"kernel": kernel}, "console": {"mode": "Null"}})
    server.vmm.put("vm.boot")
    server.vmm.put("vm.pause")
    server.vmm.put("vmm.shutdown")
    *streamed, end = data_of(read_all(client))
    assert server.wait_end() == 0

    names = [f"{one['source']}/{one['event']}" for one in streamed]
    assert names == [
        *("vmm/starting", "vm/booting", "vm/booted"),
        *["virtio-device/activated"] * 2,
        *("vm/pausing", "vm/paused", "vm/shutdown", "vm/deleted", "vmm/shutdown"),
    ]
    assert [one.pop("number") for one in streamed] == list(range(len(names)))
    assert end == {"next": len(names)}
    assert monitor.documents() == streamed
    logged = [line.partition("Event: ")[2] for line in server.stderr.splitlines() if "Event: " in line]
    assert logged == [
        f"source = {one['source']} event = {one['event']} "
        + "".join(f"{key} = {value}" for key, value in (one["properties"] or {}).items())
        for one in streamed
    ]
    server.check_end()


def test_errors_of_the_api_are_logged_in_the_reference_s_words(tmp_path: Path) -> None:
    server = Server(tmp_path / "server", ["--engine", "fake", "-v"])
    server.wait_ready()
    server.vmm.put("vm.boot", expect=404)
    wait_until(
        lambda: (
            "HTTP API error response: Error from API: The VM could not boot: VM config is missing"
            in server.stderr
        ),
        "the log",
        timeout_s=GUEST_S,
    )
    server.check_end()


def test_descriptor_wins_over_the_path_of_a_monitor(tmp_path: Path) -> None:
    path = tmp_path / "not-written"
    target = tmp_path / "written"
    with target.open("wb") as file:
        server = Server(
            tmp_path / "server",
            ["--engine", "fake", "--event-monitor", f"path={path},fd={file.fileno()}"],
            pass_fds=[file.fileno()],
        )
    server.wait_ready()
    server.check_end()
    assert EventFile(target).names() == ["vmm/starting", "vmm/shutdown"]
    assert not path.exists()
