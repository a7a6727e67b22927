"""Who may use the API: the mode of the socket, and the users that are named."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm import Vmm
from cloudvmm.api.fleet import VmmsCreateData
from cloudvmm.host.syscall import system_call
from support.daemon import Daemon
from support.deadline import HOST_S
from support.wait import wait_until

PING = b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n"
OURS = os.geteuid()
STRANGER = 54321
SETRESUID = 117


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user reaches, unlike those of the tests."""
    with tempfile.TemporaryDirectory(prefix="cloudvmm-peer-") as path:
        os.chmod(path, 0o755)
        yield Path(path)


def ask(path: Path, *, uid: int = OURS, words: bytes = PING) -> bytes | None:
    """Say `words` as user `uid`; return the status line, None where the socket may not be connected to."""
    answers: list[bytes | None] = []

    def as_user() -> None:
        if uid != OURS:
            system_call(SETRESUID, uid, uid, uid)  # of this thread alone
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(HOST_S)
            try:
                client.connect(str(path))
            except (FileNotFoundError, PermissionError):
                answers.append(None)
                return
            if words:  # who is turned away reads: what it says may come too late
                client.sendall(words)
            answers.append(client.recv(4096).partition(b"\r\n")[0])

    thread = threading.Thread(target=as_user)
    thread.start()
    thread.join(HOST_S)
    return answers[0]


def test_the_socket_is_for_its_owner_alone(folder):
    with Vmm("fake", api_socket=folder / "api"):
        assert stat.S_IMODE((folder / "api").stat().st_mode) == 0o600
        assert ask(folder / "api") == b"HTTP/1.1 200 "


@pytest.mark.root
@pytest.mark.skipif(OURS != 0, reason="Only root can be somebody else")
def test_another_user_does_not_get_past_the_mode_of_the_socket(folder):
    with Vmm("fake", api_socket=folder / "api"):
        assert ask(folder / "api", uid=STRANGER) is None


@pytest.mark.root
@pytest.mark.skipif(OURS != 0, reason="Only root can be somebody else")
def test_users_that_are_named_are_served_whatever_the_mode_and_others_are_turned_away(folder):
    with Vmm("fake", api_socket=folder / "api", peers=[STRANGER]):
        os.chmod(folder / "api", 0o666)
        assert ask(folder / "api", uid=STRANGER) == b"HTTP/1.1 200 "
        assert ask(folder / "api", uid=STRANGER + 1, words=b"") == b"HTTP/1.1 403"
        assert ask(folder / "api", words=b"") == b"HTTP/1.1 403"


def test_who_is_turned_away_takes_no_place_and_is_told_why(folder):
    with Vmm("fake", api_socket=folder / "api", max_connections=1, peers=[OURS + 1]):
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(HOST_S)
                client.connect(str(folder / "api"))
                answer = b"".join(iter(lambda client=client: client.recv(4096), b""))
            assert b"X-Cloudvmm-Error: PeerNotAdmitted\r\n" in answer
            assert answer.endswith(b'{ "error": "This user may not use the API" }')


def test_a_daemon_and_its_vms_admit_who_is_named(tmp_path):
    daemon = Daemon(tmp_path / "d", ["--engine", "fake", "--api-socket-peers", f"uid={OURS}", "uid=1"])
    daemon.wait_ready()
    daemon.client.vmms_create(VmmsCreateData(id="one"))
    with daemon.vm("one") as vm:
        vm.vmm_ping()
    daemon.check_end()


def test_a_daemon_admits_nobody_else(tmp_path):
    daemon = Daemon(tmp_path / "d", ["--engine", "fake", "--api-socket-peers", f"uid={OURS + 1}"])
    try:
        answer = wait_until(lambda: ask(Path(daemon.path), words=b""), "it answers", timeout_s=HOST_S)
        assert answer == b"HTTP/1.1 403"
    finally:
        daemon.check_end()
