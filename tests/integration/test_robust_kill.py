"""kill -9 of QEMU, of the server and of the client in the middle of each call: the others notice and say so.

Where a call waits for QEMU, QEMU is made to stand still first: so the blow falls while the call is under way.
Other calls are struck at a seeded moment after they were sent.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.attack import (
    NOTICE_S,
    Call,
    Held,
    assert_holds_no_more,
    bare_config,
    booted,
    client_process,
    find_qemu,
    has_interface,
    qemu_of,
    spend,
    stop_process,
    wait_gone,
)
from support.deadline import HOST_S
from support.process import ProcessId
from support.rest import Reply
from support.server import Server
from support.vm import EngineChoice, choose_engine
from support.vmm import Vmm, error_words
from support.wait import wait_until
from support.watch import Watch

ServerFactory = Callable[..., Server]

# Command to its method, and the state of the VM that it is called in.
CALLS = {
    "vm.create": ("PUT", "none"),
    "vm.boot": ("PUT", "created"),
    "vm.pause": ("PUT", "running"),
    "vm.resume": ("PUT", "paused"),
    "vm.info": ("GET", "running"),
    "vm.counters": ("GET", "running"),
    "vm.reboot": ("PUT", "running"),
    "vm.power-button": ("PUT", "running"),
    "vm.nmi": ("PUT", "running"),
    "vm.coredump": ("PUT", "running"),
    "vm.shutdown": ("PUT", "running"),
    "vm.delete": ("PUT", "running"),
    "vmm.ping": ("GET", "running"),
    "vm.add-disk": ("PUT", "running"),
    "vm.resize": ("PUT", "running"),
    "vm.remove-device": ("PUT", "running"),
    "vmm.shutdown": ("PUT", "running"),
}
BODIES = {
    "vm.add-disk": {"path": "/nowhere/disk", "id": "d9"},
    "vm.resize": {"desired_vcpus": 1},
    "vm.remove-device": {"id": "nobody"},
}
WAITS_FOR_QEMU = ("vm.pause", "vm.resume", "vm.power-button", "vm.nmi", "vm.coredump")
ENDS_QEMU = ("vm.reboot", "vm.shutdown", "vm.delete", "vmm.shutdown")
KILLED = "killed by signal 9 (SIGKILL)"


@pytest.fixture
def qemu_engine() -> EngineChoice:
    return choose_engine("qemu")


def bring_to(server: Server, state: str, engine: EngineChoice, folder: Path) -> None:
    if state == "none":
        return
    server.vmm.put("vm.create", bare_config(engine, folder))
    if state in ("running", "paused"):
        server.vmm.put("vm.boot")
    if state == "paused":
        server.vmm.put("vm.pause")


def body_of(command: str, engine: EngineChoice, folder: Path) -> Any:
    if command == "vm.create":
        return bare_config(engine, folder)
    if command == "vm.coredump":
        return {"destination_url": f"file://{folder}/core"}
    return BODIES.get(command)


def begin(server: Server, command: str, engine: EngineChoice, folder: Path) -> Call:
    return Call(server.socket_path, CALLS[command][0], command, body_of(command, engine, folder))


def dumps(folder: Path) -> bool:
    return (folder / "core").exists()


def dumped_bytes(server: Server, folder: Path) -> int:
    """Return how much of the dump is written by now; it has no name in its folder before it is whole."""
    for fd in Path(f"/proc/{server.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(fd).startswith(f"{folder}/#"):
                return fd.stat().st_size
    return 0


def moment(command: str) -> float:
    """Return how long after the call the blow falls, the same in every run."""
    return random.Random(command).uniform(0.0, 0.02)


def strike_qemu(server: Server, command: str, engine: EngineChoice, folder: Path) -> Call:
    """Begin the call and kill the QEMU that it is about."""
    if CALLS[command][1] != "created":
        qemu = qemu_of(server)
        if command in WAITS_FOR_QEMU:
            stop_process(qemu)
    call = begin(server, command, engine, folder)
    if CALLS[command][1] == "created":
        qemu = qemu_of(server)
    server.vmm.get("vmm.ping")
    spend(moment(command), unless=lambda: call.is_over)
    qemu.kill()
    return call


def expect_failure(server: Server) -> None:
    """A VMM that fails ends with status 1 and leaves its socket, as the reference does."""
    server.expected_status = 1
    server.keep("api")


def starts_again(cloudvmm_server: ServerFactory, path: str) -> None:
    """Start another server on the socket that a killed one has left."""
    second = cloudvmm_server("--api-socket", path, has_socket=False, ready=False)

    def answers() -> bool:
        try:
            with Vmm(path).second() as vmm:
                return vmm.get("vmm.ping")["pid"] == second.pid
        except (ConnectionRefusedError, FileNotFoundError):
            return False

    wait_until(answers, "the next server answers", timeout_s=HOST_S)


# QEMU dies


@pytest.mark.qemu
@pytest.mark.parametrize(
    "command", [command for command in CALLS if command not in (*ENDS_QEMU, "vm.create", "vm.boot")]
)
def test_death_of_qemu_ends_the_server_with_the_signal_named(
    server: Server, qemu_engine: EngineChoice, tmp_path: Path, command: str
) -> None:
    expect_failure(server)
    bring_to(server, CALLS[command][1], qemu_engine, tmp_path)
    call = strike_qemu(server, command, qemu_engine, tmp_path)
    with Watch() as watch:
        response = call.outcome(timeout_s=HOST_S)
        assert server.wait_end() == 1
    assert watch.elapsed_s < NOTICE_S
    assert KILLED in server.stderr
    assert not dumps(tmp_path)
    if command in WAITS_FOR_QEMU:
        assert response is not None and response.status == 500
        assert KILLED in error_words(response)[-1]


@pytest.mark.qemu
@pytest.mark.parametrize(
    "command", [command for command in CALLS if command not in (*ENDS_QEMU, "vm.create", "vm.boot")]
)
def test_vmm_that_is_to_stay_outlives_its_qemu_and_boots_again(
    cloudvmm_server: ServerFactory, qemu_engine: EngineChoice, tmp_path: Path, command: str
) -> None:
    server = cloudvmm_server("--no-shutdown")
    bring_to(server, CALLS[command][1], qemu_engine, tmp_path)
    call = strike_qemu(server, command, qemu_engine, tmp_path)
    with Watch() as watch:
        call.outcome(timeout_s=HOST_S)
        wait_until(lambda: server.vmm.get("vm.info")["state"] == "Created", "it is over", timeout_s=HOST_S)
    assert watch.elapsed_s < NOTICE_S
    assert not dumps(tmp_path)
    server.vmm.put("vm.boot")
    assert server.vmm.get("vm.info")["state"] == "Running"
    qemu_of(server)


@pytest.mark.qemu
@pytest.mark.parametrize("seed", range(4))
def test_death_of_qemu_while_it_boots_is_told_to_the_caller(
    server: Server, qemu_engine: EngineChoice, tmp_path: Path, seed: int
) -> None:
    server.vmm.put("vm.create", bare_config(qemu_engine, tmp_path))
    call = begin(server, "vm.boot", qemu_engine, tmp_path)
    qemu = qemu_of(server)
    spend(random.Random(seed).uniform(0.0, 0.05), unless=lambda: call.is_over)
    qemu.kill()
    with Watch() as watch:
        response = call.outcome(timeout_s=HOST_S)
    assert response is not None
    assert watch.elapsed_s < NOTICE_S
    if response.status == 204:  # it was up before the blow fell
        expect_failure(server)
        assert server.wait_end() == 1
        assert KILLED in server.stderr
        return
    assert KILLED in error_words(response)[-1]
    server.vmm.exchange("PUT", "vm.shutdown")  # 204 where the blow fell in the last step, else 500
    assert server.vmm.get("vm.info")["state"] == "Created"
    server.vmm.put("vm.boot")


@pytest.mark.qemu
def test_death_of_qemu_while_it_writes_its_memory_leaves_no_half_dump(
    cloudvmm_server: ServerFactory, qemu_engine: EngineChoice, tmp_path: Path
) -> None:
    server = cloudvmm_server("--no-shutdown")
    booted(server, qemu_engine, tmp_path, memory={"size": 1 << 30, "prefault": False})
    qemu, core = qemu_of(server), tmp_path / "core"
    call = begin(server, "vm.coredump", qemu_engine, tmp_path)
    wait_until(lambda: dumped_bytes(server, tmp_path) > 0, "the dump is being written", timeout_s=HOST_S)
    qemu.kill()
    with Watch() as watch:
        response = call.outcome(timeout_s=HOST_S)
    assert watch.elapsed_s < NOTICE_S
    assert response is not None and response.status == 500
    assert KILLED in error_words(response)[-1]
    assert not core.exists()


@pytest.mark.qemu
@pytest.mark.parametrize("command", ENDS_QEMU)
def test_death_of_qemu_while_it_is_to_end_is_no_fault_of_the_call(
    server: Server, qemu_engine: EngineChoice, tmp_path: Path, command: str
) -> None:
    bring_to(server, "running", qemu_engine, tmp_path)
    call = strike_qemu(server, command, qemu_engine, tmp_path)
    response = call.outcome(timeout_s=HOST_S)
    if response is None or response.status == 500:  # the blow came before the command: it is a crash
        expect_failure(server)
        server.wait_end()
        assert KILLED in server.stderr
        return
    assert response.status in (200, 204)
    if command == "vmm.shutdown":
        assert server.wait_end() == 0
        return
    expected = {"vm.reboot": "Running", "vm.shutdown": "Created"}.get(command)
    assert expected is None or server.vmm.get("vm.info")["state"] == expected


# The server dies


@pytest.mark.qemu
@pytest.mark.parametrize("command", CALLS)
def test_death_of_the_server_ends_qemu_and_the_call(
    cloudvmm_server: ServerFactory, server: Server, qemu_engine: EngineChoice, tmp_path: Path, command: str
) -> None:
    bring_to(server, CALLS[command][1], qemu_engine, tmp_path)
    qemu = find_qemu(server)
    if qemu is not None and command in WAITS_FOR_QEMU:
        stop_process(qemu)
    call = begin(server, command, qemu_engine, tmp_path)
    spend(moment(command), unless=lambda: call.is_over)
    server.kill()
    with Watch() as watch:
        call.outcome(timeout_s=HOST_S)
        if qemu is not None:
            wait_gone(qemu)
        wait_until(lambda: not server.children(), "nothing is left of it", timeout_s=HOST_S)
    assert watch.elapsed_s < NOTICE_S
    assert server.wait_end() == -signal.SIGKILL
    starts_again(cloudvmm_server, server.socket_path)


@pytest.mark.qemu
@pytest.mark.parametrize("seed", range(6))
def test_death_of_the_server_while_qemu_starts_leaves_no_qemu(
    server: Server, qemu_engine: EngineChoice, tmp_path: Path, seed: int
) -> None:
    server.vmm.put("vm.create", bare_config(qemu_engine, tmp_path))
    call = begin(server, "vm.boot", qemu_engine, tmp_path)
    spend(random.Random(seed).uniform(0.0, 0.06), unless=lambda: call.is_over)
    server.kill()
    call.outcome(timeout_s=HOST_S)
    assert server.wait_end() == -signal.SIGKILL


@pytest.mark.qemu
def test_death_of_the_server_while_memory_is_written_leaves_no_half_dump(
    server: Server, qemu_engine: EngineChoice, tmp_path: Path
) -> None:
    booted(server, qemu_engine, tmp_path, memory={"size": 1 << 30})
    call = begin(server, "vm.coredump", qemu_engine, tmp_path)
    wait_until(lambda: dumped_bytes(server, tmp_path) > 0, "the dump is being written", timeout_s=HOST_S)
    server.kill()
    assert call.outcome(timeout_s=HOST_S) is None
    assert not dumps(tmp_path)


@pytest.mark.qemu
@pytest.mark.root
def test_death_of_the_server_takes_its_tap_along(
    server: Server, qemu_engine: EngineChoice, tmp_path: Path
) -> None:
    net = [{"tap": "rbst1", "mac": "52:54:00:00:00:78"}]
    server.vmm.put("vm.create", bare_config(qemu_engine, tmp_path, net=net))
    server.vmm.put("vm.boot")
    assert has_interface("rbst1")
    server.kill()
    wait_until(lambda: not has_interface("rbst1"), "the interface is gone", timeout_s=HOST_S)


# The client dies


@pytest.mark.qemu
@pytest.mark.parametrize("command", CALLS)
def test_death_of_the_client_is_nobody_else_s_loss(
    server: Server, qemu_engine: EngineChoice, tmp_path: Path, command: str
) -> None:
    bring_to(server, CALLS[command][1], qemu_engine, tmp_path)
    before = Held(server.pid)
    qemu = find_qemu(server)
    if qemu is not None and command in WAITS_FOR_QEMU:
        stop_process(qemu)
    body = body_of(command, qemu_engine, tmp_path)
    with client_process(server.socket_path, CALLS[command][0], command, body) as client:
        spend(moment(command))
        client.kill()
    if command == "vmm.shutdown":
        assert server.wait_end() == 0
        return
    server.vmm.get("vmm.ping")
    if qemu is not None and qemu.is_alive():
        os.kill(qemu.pid, signal.SIGCONT)
    settles_after(server, command)
    server.vmm.put("vm.delete")
    assert server.vmm.exchange("GET", "vm.info").status == 404
    assert_holds_no_more(server.pid, before)


def settles_after(server: Server, command: str) -> None:
    """Wait until the command that nobody waits for any more has been carried out."""
    states = {
        "vm.create": "Created",
        "vm.boot": "Running",
        "vm.pause": "Paused",
        "vm.shutdown": "Created",
        "vm.delete": None,
    }
    expected = states.get(command, "Running")

    def is_settled() -> bool:
        reply: Reply = server.vmm.exchange("GET", "vm.info")
        return (msgspec.json.decode(reply.body)["state"] if reply.status == 200 else None) == expected

    wait_until(is_settled, f"{command} is carried out", timeout_s=HOST_S)


@pytest.mark.qemu
def test_ten_clients_that_die_at_once_leave_room_for_others(
    server: Server, qemu_engine: EngineChoice, tmp_path: Path
) -> None:
    booted(server, qemu_engine, tmp_path)
    server.vmm.close()
    qemu: ProcessId = qemu_of(server)
    stop_process(qemu)
    calls = [client_process(server.socket_path, "PUT", "vm.nmi") for _ in range(10)]
    for call in calls:
        call.__enter__()
    for call in calls:
        call.__exit__(None, None, None)
    os.kill(qemu.pid, signal.SIGCONT)

    def has_room() -> bool:
        with server.vmm.connect() as client:
            return client.ping().status == 200

    wait_until(has_room, "there is room again", timeout_s=HOST_S)
