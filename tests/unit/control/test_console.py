"""Consoles: bytes both ways and whole, kept for a late reader, one client at a time, nothing left open."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time

import pytest

from cloudvmm import api
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, DebugConsoleConfig, SerialConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.console import ConsoleError, Consoles, open_consoles
from cloudvmm.control.relay import RING_BYTES, PairStream
from cloudvmm.engine.base import SinkKind

DEADLINE_S = 10.0
MODE = ConsoleOutputMode


def config(serial=None, console=None, debug_console=None) -> VmConfig:
    return VmConfig(
        serial=serial or SerialConfig(mode=MODE.OFF),
        console=console or ConsoleConfig(mode=MODE.OFF),
        debug_console=debug_console or DebugConsoleConfig(mode=MODE.OFF),
    )


def engine_end(consoles: Consoles) -> socket.socket:
    """The serial stream as the engine has it."""
    stream = socket.socket(fileno=os.dup(consoles.sinks()[0].stream_fd))
    stream.settimeout(DEADLINE_S)
    return stream


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="Needs root, for more room than others may have")
def test_many_short_lines_of_a_guest_wait_for_a_reader_who_is_late():
    stream = PairStream()
    engine = socket.socket(fileno=os.dup(stream.engine_fd))
    engine.setblocking(False)

    for _ in range(1000):
        engine.send(b"x")

    assert stream.read() == b"x" * 1000
    engine.close()
    stream.close()


def client_of(path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE_S)
    client.connect(str(path))
    return client


def receive(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = stream.recv(65536)
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    return data


def read_fd(fd: int, size: int) -> bytes:
    data = b""
    deadline = time.monotonic() + DEADLINE_S
    while len(data) < size:
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        assert readable, f"{len(data)} of {size} bytes came in time"
        data += os.read(fd, 65536)
    return data


@pytest.fixture
def on_socket(tmp_path):
    consoles = open_consoles(config(SerialConfig(mode=MODE.SOCKET, socket=str(tmp_path / "serial"))))
    yield consoles
    consoles.close()
    assert not (tmp_path / "serial").exists()


@pytest.fixture
def on_pty():
    vm_config = config(SerialConfig(mode=MODE.PTY))
    consoles = open_consoles(vm_config)
    consoles.write_paths(vm_config)
    yield consoles, vm_config.serial.file
    consoles.close()


def test_sinks_follow_the_modes(tmp_path):
    path = tmp_path / "out"
    consoles = open_consoles(
        config(SerialConfig(mode=MODE.FILE, file=str(path)), ConsoleConfig(mode=MODE.NULL))
    )

    serial, console, debug_console = consoles.sinks()

    assert (serial.kind, serial.path) == (SinkKind.FILE, str(path))
    assert (console.kind, debug_console.kind) == (SinkKind.NULL, SinkKind.OFF)
    assert path.stat().st_mode & 0o777 == 0o600
    consoles.close()


def test_a_file_is_truncated(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")

    open_consoles(config(SerialConfig(mode=MODE.FILE, file=str(path)))).close()

    assert path.read_text() == ""


def test_what_another_vmm_has_open_is_gone_on_with(tmp_path):
    path, log = tmp_path / "socket", tmp_path / "log"
    vm_config = config(
        SerialConfig(mode=MODE.SOCKET, socket=str(path)), ConsoleConfig(mode=MODE.FILE, file=str(log))
    )
    before = open_consoles(vm_config)
    log.write_text("said before")
    with contextlib.closing(open_consoles(vm_config, is_continued=True)) as after:
        assert log.read_text() == "said before"
        with client_of(path) as client, engine_end(before) as guest:
            client.sendall(b"x")
            assert receive(guest, 1) == b"x"
        after.take_places()
        before.close()
        with client_of(path) as client, engine_end(after) as guest:
            client.sendall(b"y")
            assert receive(guest, 1) == b"y"
    assert os.listdir(tmp_path) == ["log"]


def test_a_megabyte_goes_through_a_socket_whole_in_both_directions(on_socket, tmp_path):
    data = os.urandom(1 << 20)
    engine, client = engine_end(on_socket), client_of(tmp_path / "serial")
    client.sendall(b"x")
    assert receive(engine, 1) == b"x"  # the relay has the client now

    for source, sink in ((engine, client), (client, engine)):
        sender = threading.Thread(target=source.sendall, args=(data,))
        sender.start()
        assert receive(sink, len(data)) == data
        sender.join(DEADLINE_S)

    engine.close()
    client.close()


def test_what_was_said_before_anybody_listened_is_replayed(on_socket, tmp_path):
    engine = engine_end(on_socket)
    engine.sendall(b"early words\n")

    client = client_of(tmp_path / "serial")

    assert receive(client, 12) == b"early words\n"
    engine.close()
    client.close()


def test_the_newest_megabyte_is_kept_and_the_guest_is_never_held_up(on_socket, tmp_path):
    engine = engine_end(on_socket)
    engine.sendall(b"old" * RING_BYTES)
    engine.sendall(b"n" * RING_BYTES)

    client = client_of(tmp_path / "serial")

    assert receive(client, RING_BYTES)[-1000:] == b"n" * 1000
    engine.close()
    client.close()


def test_a_new_client_takes_the_place_of_the_old_one(on_socket, tmp_path):
    engine, old = engine_end(on_socket), client_of(tmp_path / "serial")
    old.sendall(b"1")
    receive(engine, 1)

    new = client_of(tmp_path / "serial")
    assert old.recv(1) == b""
    engine.sendall(b"for the new one")

    assert receive(new, 15) == b"for the new one"
    for stream in (engine, old, new):
        stream.close()


def test_a_new_stream_after_a_reboot_reaches_the_same_client(on_socket, tmp_path):
    first, client = engine_end(on_socket), client_of(tmp_path / "serial")
    first.sendall(b"first;")
    first.close()

    on_socket.renew_streams()
    second = engine_end(on_socket)
    second.sendall(b"second")

    assert receive(client, 12) == b"first;second"
    second.close()
    client.close()


def test_a_socket_path_that_exists_is_refused(tmp_path):
    (tmp_path / "serial").write_text("mine")

    with pytest.raises(ConsoleError, match="^Error creating console device$"):
        open_consoles(config(SerialConfig(mode=MODE.SOCKET, socket=str(tmp_path / "serial"))))
    assert (tmp_path / "serial").read_text() == "mine"


def test_a_pty_keeps_what_was_said_and_carries_bytes_raw(on_pty):
    consoles, path = on_pty
    engine = engine_end(consoles)
    engine.sendall(b"early\r\n\x03\x04")

    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    assert read_fd(fd, 9) == b"early\r\n\x03\x04"
    os.write(fd, b"in\x03\n")

    assert receive(engine, 4) == b"in\x03\n"
    os.close(fd)
    engine.close()


def test_a_pty_nobody_opened_costs_no_time(on_pty):
    consoles, _ = on_pty
    engine = engine_end(consoles)
    engine.sendall(b"x" * 100_000)
    before = time.thread_time_ns(), time.process_time_ns()

    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        select.select([], [], [], max(0.0, deadline - time.monotonic()))

    assert time.process_time_ns() - before[1] < 150_000_000
    engine.close()


@pytest.mark.parametrize(
    ("vm_config", "text"),
    [
        (config(SerialConfig(mode=MODE.FILE)), "Path missing"),
        (config(SerialConfig(mode=MODE.SOCKET)), "Path missing"),
        (config(console=ConsoleConfig(mode=MODE.SOCKET, socket="/s")), "No socket option support"),
        (config(debug_console=DebugConsoleConfig(mode=MODE.SOCKET)), "No socket option support"),
        (config(SerialConfig(mode=MODE.FILE, file="/nonexistent/f")), "Error creating console device"),
    ],
)
def test_what_cannot_be_opened_is_refused_and_nothing_stays_open(vm_config, text):
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    vm_config.console = (
        ConsoleConfig(mode=MODE.PTY) if vm_config.console.mode is MODE.OFF else vm_config.console
    )

    with pytest.raises(ConsoleError, match=text):
        open_consoles(vm_config)

    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_opening_and_closing_leaves_nothing(tmp_path):
    vm_config = config(
        SerialConfig(mode=MODE.SOCKET, socket=str(tmp_path / "s")), ConsoleConfig(mode=MODE.PTY)
    )
    before = len(os.listdir("/proc/self/fd")), threading.active_count()

    for _ in range(20):
        open_consoles(vm_config).close()

    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_the_vmm_shows_the_pty_and_the_guest_speaks_on_it(caller, vm_config):
    vm_config.serial = SerialConfig(mode=MODE.PTY)
    caller(api.vm_create, vm_config)
    path = caller(api.vm_info).config.serial.file
    caller(api.vm_boot)

    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    assert read_fd(fd, 33) == b"cloudvmm-guest ready uptime=0.00\n"
    caller(api.vm_reboot)
    assert read_fd(fd, 33) == b"cloudvmm-guest ready uptime=0.00\n"

    assert caller(api.vm_info).config.serial.file == path
    os.close(fd)


def test_a_console_that_cannot_be_opened_fails_create_and_keeps_the_config(caller, vm_config):
    vm_config.serial = SerialConfig(mode=MODE.FILE, file="/nonexistent/f")

    assert caller.refusal(api.vm_create, vm_config)[:3] == [
        "The VM could not be created",
        "Error creating console devices",
        "Error creating console device",
    ]
    assert caller(api.vm_info).state is api.VmState.CREATED
