"""A measurement that cannot be made ends with the reason."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import bed
from bed import Probe, check_peer, connect
from harness import PEER_FACT, Report, note_peer
from page import machines
from support.deadline import HOST_S


@pytest.fixture
def refusing(tmp_path: Path) -> Iterator[str]:
    """The socket of a server that refuses one request."""
    path = str(tmp_path / "api")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()

        def refuse() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(bed.READ_BYTES)
                client.sendall(b'HTTP/1.1 500 \r\nContent-Length: 7\r\n\r\n["No."]')

        thread = threading.Thread(target=refuse)
        thread.start()
        yield path
        thread.join(HOST_S)


def test_probe_tells_when_the_server_closes_instead_of_answering(tmp_path: Path) -> None:
    path = str(tmp_path / "api")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        probe = Probe(path, "GET", "vmm.ping")
        server, _ = listener.accept()

        def close_halfway() -> None:
            server.recv(4096)
            server.sendall(b"HTTP/1.1 200 \r\n")
            server.close()

        closing = threading.Thread(target=close_halfway, daemon=True)
        closing.start()
        with pytest.raises(EOFError, match="in the middle of a measurement"):
            probe.timed_us()
        probe.close()
        closing.join(HOST_S)
        assert not closing.is_alive()


def test_refused_request_is_not_measured(refusing: str) -> None:
    probe = Probe(refusing, "PUT", "vm.create", b"{}")
    with pytest.raises(SystemExit, match=r"No\."):
        probe.timed_us()
    probe.close()


def test_program_that_ends_at_its_start_tells_why(tmp_path: Path) -> None:
    (tmp_path / "stderr").write_text("There is no /dev/kvm\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match="ended with status 3: There is no /dev/kvm"):
        connect(str(tmp_path / "api"), process, timeout_s=HOST_S)


def test_peer_that_does_not_start_ends_the_run_at_once(tmp_path: Path) -> None:
    peer = tmp_path / "peer"
    peer.write_text("#!/bin/sh\necho 'No hypervisor' >&2\nexit 1\n")
    peer.chmod(0o755)
    with pytest.raises(SystemExit, match="ended with status 1: No hypervisor"):
        check_peer(str(peer))


def test_page_names_the_peer(tmp_path: Path) -> None:
    peer = tmp_path / "peer"
    peer.write_text("#!/bin/sh\necho cloud-hypervisor v54.0.0\necho more\n")
    peer.chmod(0o755)
    report = Report("API")
    note_peer(report, str(peer))

    assert report.machine[PEER_FACT] == "cloud-hypervisor v54.0.0"
    assert "- Beside cloud-hypervisor v54.0.0" in machines({"api_latency": {"machine": report.machine}})
