"""The server fixture's own promise: what a server leaves behind is found, and ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.deadline import HOST_S
from support.process import ProcessId, descendants_of, identify, state_of
from support.server import Server
from support.wait import wait_until

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEPER, stdin=subprocess.PIPE)
    yield process
    process.communicate(timeout=HOST_S)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    server = Server(tmp_path / "server", ["--engine", "fake"])
    server.wait_ready()
    return server


def test_process_is_known_by_its_start_too(sleeper: subprocess.Popen[bytes]) -> None:
    who = identify(sleeper.pid)
    assert who is not None
    assert who in descendants_of(sleeper.pid) | {who}
    assert who.is_alive()
    assert not ProcessId(who.pid, who.start_ticks + 1).is_alive()


def test_process_that_ended_is_not_alive_while_nobody_waited_for_it(sleeper: subprocess.Popen[bytes]) -> None:
    who = identify(sleeper.pid)
    assert who is not None
    who.kill()
    wait_until(lambda: state_of(sleeper.pid) == "Z", "it ends", timeout_s=HOST_S)
    assert not who.is_alive()


def test_file_left_behind_is_told(server: Server) -> None:
    (server.folder / "forgotten").write_bytes(b"")
    with pytest.raises(AssertionError, match="The server left behind file forgotten:"):
        server.check_end()


def test_file_that_was_to_be_kept_may_stay(server: Server) -> None:
    server.keep("wanted").write_bytes(b"")
    server.check_end()
    assert not server.is_running


def test_process_left_behind_is_told_and_ended(server: Server, sleeper: subprocess.Popen[bytes]) -> None:
    who = identify(sleeper.pid)
    assert who is not None
    server._children.add(who)  # as if the server had started it
    with pytest.raises(AssertionError, match=f"The server left behind process {sleeper.pid}:"):
        server.check_end()
    wait_until(lambda: not who.is_alive(), "it ends", timeout_s=HOST_S)


def test_unexpected_exit_status_is_told(server: Server) -> None:
    server.kill()
    server.expected_status = 0
    (server.folder / "api").unlink()
    with pytest.raises(AssertionError, match="exit status is -9 instead of 0"):
        server.check_end()


def test_server_that_cannot_start_is_told_with_its_words(tmp_path: Path) -> None:
    server = Server(tmp_path / "server", ["--no-such-flag"])
    with pytest.raises(AssertionError, match="The server ended with status 2:[^$]*--no-such-flag"):
        server.wait_ready()
