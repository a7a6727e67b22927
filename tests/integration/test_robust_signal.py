"""SIGTERM and SIGINT at any moment: the VM is deleted, all events are told, and nothing stays."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.attack import Call, bare_config, find_qemu, qemu_of, read_events, spend, stop_process, wait_gone
from support.deadline import HOST_S
from support.device.fs import SHARED_MEMORY
from support.server import Server
from support.vm import EngineChoice, choose_engine
from support.wait import wait_until
from support.watch import Watch

ServerFactory = Callable[..., Server]

END_S = 4.0  # of a `Watch`; a VMM that waits for a program needs five seconds, at least
SIGNALS = [signal.SIGTERM, signal.SIGINT]
BEGUN = {"vm.coredump": "vm/coredumping", "vm.pause": "vm/pausing", "vm.reboot": "vm/rebooting"}
LAST_EVENTS = ["vm/shutdown", "vm/deleted", "vmm/shutdown"]


@pytest.fixture
def events(tmp_path: Path) -> Path:
    return tmp_path / "events"


@pytest.fixture
def watched(cloudvmm_server: ServerFactory, events: Path) -> Server:
    """A server with an event monitor."""
    return cloudvmm_server("--event-monitor", f"path={events}")


@pytest.fixture
def hanging_clients(watched: Server) -> Iterator[None]:
    """Clients that stopped half-way: in the head, in the body, and before they read their answers."""
    with watched.vmm.connect() as one, watched.vmm.connect() as two, watched.vmm.connect() as three:
        one.send(b"PUT /api/v1/vm.cre")
        two.send(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{")
        three.socket.setblocking(False)
        ask = b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n" * 100
        try:
            while three.socket.send(ask):
                pass
        except BlockingIOError:
            yield


def end_by(server: Server, number: signal.Signals) -> None:
    """Send the signal and see the server out: in time, with status 0, without its socket."""
    server.children()
    with Watch() as watch:
        os.kill(server.pid, number)
        assert server.wait_end() == 0
    assert watch.elapsed_s < END_S
    assert not os.path.exists(server.socket_path)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_without_a_vm_ends_the_vmm(
    fake_engine: EngineChoice, watched: Server, events: Path, number: signal.Signals
) -> None:
    end_by(watched, number)
    assert read_events(events) == ["vmm/starting", "vmm/shutdown"]


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_with_a_running_vm_deletes_it(
    any_engine: EngineChoice, watched: Server, events: Path, tmp_path: Path, number: signal.Signals
) -> None:
    watched.vmm.put("vm.create", bare_config(any_engine, tmp_path))
    watched.vmm.put("vm.boot")
    end_by(watched, number)
    assert read_events(events) == ["vmm/starting", "vm/booting", "vm/booted", *LAST_EVENTS]


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_while_clients_hang_half_way_ends_the_vmm_in_time(
    fake_engine: EngineChoice, watched: Server, events: Path, hanging_clients: None, number: signal.Signals
) -> None:
    end_by(watched, number)
    assert read_events(events)[-1] == "vmm/shutdown"


@pytest.mark.qemu
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("seed", range(5))
def test_signal_while_the_vm_boots_ends_both(
    watched: Server, events: Path, tmp_path: Path, seed: int, number: signal.Signals
) -> None:
    watched.vmm.put("vm.create", bare_config(choose_engine("qemu"), tmp_path))
    call = Call(watched.socket_path, "PUT", "vm.boot")
    wait_until(lambda: b'"booting"' in events.read_bytes(), "the boot is under way", timeout_s=HOST_S)
    spend(random.Random(seed).uniform(0, 0.15), unless=lambda: call.is_over)
    end_by(watched, number)
    response = call.outcome(timeout_s=HOST_S)
    assert response is not None
    told = read_events(events)
    assert told[-2:] == LAST_EVENTS[1:]
    assert ("vm/shutdown" in told) or "vm/booted" not in told


@pytest.mark.qemu
@pytest.mark.parametrize("command", ["vm.coredump", "vm.pause", "vm.reboot", "vm.shutdown", "vm.delete"])
@pytest.mark.parametrize("still", [False, True], ids=["", "qemu-stands-still"])
def test_signal_in_the_middle_of_a_call_overtakes_it(
    watched: Server, events: Path, tmp_path: Path, command: str, still: bool
) -> None:
    watched.vmm.put("vm.create", bare_config(choose_engine("qemu"), tmp_path))
    watched.vmm.put("vm.boot")
    qemu = qemu_of(watched)
    if still:
        stop_process(qemu)
    core = tmp_path / "core"
    body: Any = {"destination_url": f"file://{core}"} if command == "vm.coredump" else None
    call = Call(watched.socket_path, "PUT", command, body)
    if begun := BEGUN.get(command):
        wait_until(lambda: begun in read_events(events), f"{command} is under way", timeout_s=HOST_S)
    end_by(watched, signal.SIGTERM)
    response = call.outcome(timeout_s=HOST_S)
    assert response is not None or not begun
    wait_gone(qemu)
    assert not core.exists() or (response is not None and response.status == 204)
    told = read_events(events)
    expected = LAST_EVENTS[1:] if "vm/rebooting" in told and "vm/rebooted" not in told else LAST_EVENTS
    assert [event for event in told if event in LAST_EVENTS][-len(expected) :] == expected


@pytest.mark.qemu
@pytest.mark.parametrize("is_late", [False, True], ids=["boot", "addition"])
def test_signal_while_a_helper_program_says_nothing_ends_the_vmm(
    cloudvmm_server: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    started = tmp_path / "started"
    for name in ("swtpm", "virtiofsd"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch {started}\nexec sleep 1000\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    server = cloudvmm_server()
    folder = str(tmp_path)
    more = SHARED_MEMORY if is_late else {"tpm": {"state_dir": folder}}
    server.vmm.put("vm.create", bare_config(choose_engine("qemu"), tmp_path, **more))
    if is_late:
        server.vmm.put("vm.boot")
    body = {"id": "fs", "tag": "fs", "shared_dir": folder} if is_late else None
    call = Call(server.socket_path, "PUT", "vm.add-fs" if is_late else "vm.boot", body)
    wait_until(started.exists, "the program is waited for", timeout_s=HOST_S)
    end_by(server, signal.SIGTERM)
    response = call.outcome(timeout_s=HOST_S)
    assert response is not None
    assert response.status == 500


@pytest.mark.qemu
def test_second_signal_changes_nothing(watched: Server, events: Path, tmp_path: Path) -> None:
    watched.vmm.put("vm.create", bare_config(choose_engine("qemu"), tmp_path))
    watched.vmm.put("vm.boot")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(watched.pid, number)
    end_by(watched, signal.SIGINT)
    assert read_events(events)[-3:] == LAST_EVENTS


@pytest.mark.qemu
@pytest.mark.parametrize("seed", range(6))
def test_signal_during_a_start_from_the_command_line_ends_with_status_0(
    cloudvmm_server: ServerFactory, events: Path, tmp_path: Path, seed: int
) -> None:
    payload = choose_engine("qemu").payload(tmp_path)
    flags = ["--kernel", payload["kernel"], "--initramfs", payload["initramfs"], "--memory", "size=256M"]
    server = cloudvmm_server(
        *flags, "--serial", "null", "--console", "off", "--event-monitor", f"path={events}", ready=False
    )
    wait_until(lambda: os.path.exists(server.socket_path), "it serves", timeout_s=HOST_S)
    spend(random.Random(seed).uniform(0, 0.2), unless=lambda: find_qemu(server) is not None and seed % 2 == 0)
    end_by(server, signal.SIGTERM)
    assert read_events(events)[-1] == "vmm/shutdown"


@pytest.mark.qemu
def test_signal_while_an_unknown_qemu_is_looked_at_leaves_no_qemu(
    cloudvmm_server: ServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDVMM_CACHE", str(tmp_path / "empty-cache"))
    server = cloudvmm_server()
    wait_until(server.children, "QEMU is looked at", timeout_s=HOST_S)
    end_by(server, signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_with_standard_error_full_ends_the_vmm(
    fake_engine: EngineChoice, cloudvmm_server: ServerFactory, tmp_path: Path, number: signal.Signals
) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
    try:
        server = cloudvmm_server("-v", "--log-file", str(fifo))
        try:
            while os.write(reader, b"x" * 4096):
                pass
        except BlockingIOError:
            assert server.vmm.put("vm.boot", expect=404)[-1] == "VM config is missing"
        end_by(server, number)
    finally:
        os.close(reader)
