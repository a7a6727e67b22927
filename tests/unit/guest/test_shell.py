"""The host's end of the shell service, against a scripted guest on a socketpair or a PTY."""

import base64
import os
import socket
import subprocess
import threading
import time
import tty

import pytest

from cloudvmm.guest.error import GuestProtocolError, GuestShellClosed, GuestShellTimeout
from cloudvmm.guest.shell import GuestShell, ready_uptime_s
from support.deadline import HOST_S


@pytest.fixture
def pair():
    host, guest = socket.socketpair()
    guest.settimeout(HOST_S)
    with host, guest:
        yield host, guest


def answering(guest, *answers):
    """Send each of `answers` after one request line; return the thread and the requests it saw."""
    requests: list[bytes] = []

    def work():
        lines = guest.makefile("rb")
        for answer in answers:
            requests.append(lines.readline())
            guest.sendall(answer)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, requests


def out(script_id, number, data):
    chunk = base64.b64encode(data).decode()
    return f"@cvm out {script_id} {number} {len(chunk)} {chunk}\n".encode()


def test_run_sends_the_script_and_gives_status_and_output(pair):
    host, guest = pair
    answer = b"@cvm begin 1\n" + out(1, 1, b"one\n") + out(1, 2, b"two\0\xff") + b"@cvm end 1 3 2\n"
    thread, requests = answering(guest, answer)

    status, output = GuestShell(host).run("echo 'ü'\nexit 3", timeout_s=10)

    thread.join(HOST_S)
    assert (status, output) == (3, b"one\ntwo\0\xff")
    verb, script_id, body = requests[0].split()
    assert (verb, script_id, base64.b64decode(body).decode()) == (b"run", b"1", "echo 'ü'\nexit 3")


def test_console_lines_between_and_before_answers_are_handed_on(pair):
    host, guest = pair
    seen: list[bytes] = []
    answer = b"[ 1.0] kernel\r\n~ # @cvm begin 1\r\n[ 1.1] more\r\n@cvm end 1 0 0\r\n"
    answering(guest, answer)

    assert GuestShell(host, on_line=seen.append).run("true", timeout_s=10) == (0, b"")
    assert seen == [b"[ 1.0] kernel", b"[ 1.1] more"]


def test_late_answer_to_a_script_given_up_is_passed_over(pair):
    host, guest = pair
    shell = GuestShell(host)
    with pytest.raises(GuestShellTimeout):
        shell.run("sleep 9", timeout_s=0)
    late = out(1, 1, b"old") + b"@cvm end 1 0 1\n"
    answering(guest, late + out(2, 1, b"new") + b"@cvm end 2 0 1\n")

    assert shell.run("echo new", timeout_s=10) == (0, b"new")


def test_silent_guest_times_out_at_the_deadline(pair):
    host, _ = pair
    begun = time.monotonic()

    with pytest.raises(GuestShellTimeout):
        GuestShell(host).run("true", timeout_s=0.05)

    assert 0.04 < time.monotonic() - begun < HOST_S / 2


def test_guest_that_reads_nothing_times_out(pair):
    host, _ = pair

    with pytest.raises(GuestShellTimeout):
        GuestShell(host).run("#" * (8 << 20), timeout_s=0.2)


@pytest.mark.parametrize("flood", [["yes"], ["yes", "@cvm pong"], ["cat", "/dev/zero"]])
def test_guest_that_never_stops_talking_times_out(pair, flood):
    host, guest = pair
    guest.setblocking(True)
    shell = GuestShell(host)
    begun = time.monotonic()
    with subprocess.Popen(flood, stdout=guest) as child:
        try:
            with pytest.raises(GuestShellTimeout):
                shell.run("true", timeout_s=0.3)
        finally:
            child.kill()

    assert time.monotonic() - begun < HOST_S / 2


def test_line_without_end_is_kept_in_bounds_and_handed_on(pair):
    host, guest = pair
    seen: list[bytes] = []
    answering(guest, b"x" * 200_000 + b"\n@cvm begin 1\n@cvm end 1 0 0\n")

    assert GuestShell(host, on_line=seen.append).run("true", timeout_s=10) == (0, b"")
    assert b"".join(seen) == b"x" * 200_000
    assert max(len(line) for line in seen) <= 1 << 16


def test_closed_stream_is_told_apart_from_silence(pair):
    host, guest = pair
    guest.close()

    with pytest.raises(GuestShellClosed):
        GuestShell(host).run("true", timeout_s=10)


@pytest.mark.parametrize(
    "answer",
    [
        out(1, 2, b"x"),
        b"@cvm out 1 1 8 eHg=\n",
        b"@cvm out 1 1 4 e*g=\n",
        b"@cvm out 1 one 4 eHg=\n",
        b"@cvm out 1 1\n",
        out(1, 1, b"x") + b"@cvm end 1 0 2\n",
        b"@cvm end 1 zero 0\n",
    ],
    ids=["chunk lost", "chunk cut", "not base64", "no number", "field lost", "last chunk lost", "no status"],
)
def test_garbled_answer_is_refused(pair, answer):
    host, guest = pair
    answering(guest, answer)

    with pytest.raises(GuestProtocolError):
        GuestShell(host).run("true", timeout_s=10)


def test_wait_ready_returns_at_the_services_own_announcement(pair):
    host, guest = pair
    guest.sendall(b"noise\n\n@cvm ready uptime=1.23\n")

    GuestShell(host).wait_ready(10)
    guest.setblocking(False)
    with pytest.raises(BlockingIOError):  # it did not have to ask
        guest.recv(100)


def test_wait_ready_asks_a_service_that_was_there_before_us(pair):
    host, guest = pair
    thread, requests = answering(guest, b"@cvm pong ready\n")

    GuestShell(host).wait_ready(10)

    thread.join(HOST_S)
    assert requests == [b"ping ready\n"]


def test_wait_ready_times_out(pair):
    host, _ = pair

    with pytest.raises(GuestShellTimeout):
        GuestShell(host).wait_ready(0.05)


def test_large_output_comes_through_a_pty():
    data = os.urandom(300_000)
    chunks = [data[at : at + 1536] for at in range(0, len(data), 1536)]
    answer = b"".join(out(1, number, chunk) for number, chunk in enumerate(chunks, start=1))
    answer += b"@cvm end 1 0 %d\n" % len(chunks)
    host, guest = os.openpty()
    tty.setraw(guest)

    def work():
        while not os.read(guest, 4096).endswith(b"\n"):
            pass
        with os.fdopen(os.dup(guest), "wb") as stream:
            stream.write(answer)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        assert GuestShell(host).run("cat data", timeout_s=30) == (0, data)
        thread.join(HOST_S)
    finally:
        os.close(guest)
        os.close(host)


def test_ready_uptime_is_read_from_the_console():
    assert ready_uptime_s(b"x\r\ncloudvmm-guest ready uptime=1.38\r\n") == 1.38
    assert ready_uptime_s(b"cloudvmm-guest") is None
