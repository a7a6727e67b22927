"""The sign of life on a terminal, and that nobody else gets to see it."""

import contextlib
import os
import subprocess
import sys
import threading

import pytest

from cloudvmm.cli.remote.progress import Progress
from support.peer import Peer, answering
from support.wait import wait_until

DONE = b"HTTP/1.1 204 \r\n\r\n"
PROGRAM = """
import sys
from cloudvmm.cli.remote.main import main
status = main(sys.argv[1:])
print(sorted({"rich", "asyncio", "jeepney"} & set(sys.modules)))
print(sorted(name for name in sys.modules if name.startswith(("cloudvmm.engine", "cloudvmm.control"))))
sys.exit(status)
"""


@pytest.fixture
def socket_path(tmp_path):
    return str(tmp_path / "api")


@pytest.fixture
def terminal():
    """Both ends of a terminal: ours, and the one to be somebody's standard error."""
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def start(socket_path, *words, stderr, term="xterm"):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--api-socket", socket_path, *words],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "TERM": term, "COLUMNS": "100"},
        text=True,
    )


def end(process):
    """Return its status and its two lines of modules."""
    out, _ = process.communicate(timeout=30)
    return process.returncode, out.splitlines()


class Screen:
    """Collects what is written to a terminal."""

    def __init__(self, fd):
        self.text = ""
        self._fd = fd
        os.set_blocking(fd, False)

    def shows(self, text):
        with contextlib.suppress(BlockingIOError):
            self.text += os.read(self._fd, 65536).decode()
        return text in self.text


def test_long_command_is_shown_on_a_terminal_and_wiped(socket_path, terminal):
    is_seen = threading.Event()

    def script(talk):
        talk.read_request()
        assert is_seen.wait(20)
        talk.send(DONE)

    screen = Screen(terminal[0])
    with (
        Peer(socket_path, script),
        start(socket_path, "snapshot", "file:///s", stderr=terminal[1]) as process,
    ):
        try:
            wait_until(lambda: screen.shows("Writing the snapshot"), "the progress is drawn", timeout_s=20)
        finally:
            is_seen.set()
        status, lines = end(process)
    assert (status, lines[0]) == (0, "['rich']")
    assert screen.shows("\x1b[2K")
    assert screen.text.rindex("\x1b[2K") > screen.text.rindex("Writing the snapshot")


def test_what_the_server_knows_of_it_is_shown_in_percent(socket_path, terminal):
    is_seen = threading.Event()
    job = b'{"id":3,"command":"vm.snapshot","state":"Running","since":1.5,"elapsed_ms":9,'
    body = b'{"jobs":[' + job + b'"can_cancel":true,"done_bytes":1,"total_bytes":4,"percent":25.0}]}'
    told = b"HTTP/1.1 200 \r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    def slow(talk):
        talk.read_request()
        assert is_seen.wait(20)
        talk.send(DONE)

    screen = Screen(terminal[0])
    with (
        Peer(socket_path, slow, lambda talk: talk.keep_answering(told, idle_s=20)),
        start(socket_path, "snapshot", "file:///s", stderr=terminal[1]) as process,
    ):
        try:
            wait_until(lambda: screen.shows(" 25%"), "it is told how far it is", timeout_s=20)
        finally:
            is_seen.set()
        status, _ = end(process)
    assert status == 0


@pytest.mark.parametrize(("words", "term"), [(["boot"], "xterm"), (["pause"], "xterm"), (["boot"], "dumb")])
def test_quick_command_draws_nothing(socket_path, terminal, words, term):
    screen = Screen(terminal[0])
    with (
        Peer(socket_path, answering(DONE)),
        start(socket_path, *words, stderr=terminal[1], term=term) as process,
    ):
        status, lines = end(process)
    assert (status, lines[0]) == (0, "[]")
    assert not screen.shows("ing the VM")
    assert screen.text == ""


def test_what_is_no_terminal_is_not_drawn_on(monkeypatch):
    with open(os.devnull, "w") as nobody:
        monkeypatch.setattr("sys.stderr", nobody)
        threads = threading.active_count()
        with Progress("Booting the VM", patience_s=0.0):
            assert threading.active_count() == threads


def test_pipe_sees_nothing(socket_path):
    with Peer(socket_path, answering(DONE)), start(socket_path, "boot", stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out.splitlines()[0], err) == (0, "[]", "")


def test_ping_loads_little(socket_path):
    pong = b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}"
    with Peer(socket_path, answering(pong)), start(socket_path, "ping", stderr=None) as process:
        status, lines = end(process)
    assert (status, lines) == (0, ["{}", "[]", "[]"])
