"""Readers are answered while somebody else's command changes the VM. How fast is what `benches/` shows.

That a command is under way is what the server itself says before a read and behind it: no clock decides.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.attack import Call, bare_config, booted, qemu_of, spend, stop_process
from support.deadline import HOST_S
from support.rest import RestClient
from support.server import Server
from support.vm import choose_engine

READERS = ("vmm.ping", "vm.info")
STILL_S = 2.0  # as a busy host may
OFTEN = 5  # a read that waits for the command is answered once beside it, if at all
ATTEMPTS = 10  # a command may be over before it was read often enough


class Reader:
    """Asks without pause, in a thread of its own, until it is stopped; `beside` counts by running command."""

    def __init__(self, server: Server, command: str) -> None:
        self.beside: Counter[str] = Counter()
        self.failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(server.socket_path, command))
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(2 * HOST_S)
        assert not self._thread.is_alive()
        assert self.failure is None, self.failure

    def _run(self, path: str, command: str) -> None:
        try:
            with RestClient(path, timeout_s=HOST_S) as client:
                before = running(client)
                while not self._stop.is_set():
                    get(client, command)
                    after = running(client)
                    self.beside.update(name for job, name in before.items() if job in after)
                    before = after
        except Exception as error:
            self.failure = error


def get(client: RestClient, command: str) -> Any:
    reply = client.ask("GET", command)
    assert reply.status == 200, reply.raw
    return msgspec.json.decode(reply.body)


def running(client: RestClient) -> dict[int, str]:
    """Return the commands that are carried out now, by the number of their job."""
    jobs = get(client, "vmm.jobs")["jobs"]
    return {job["id"]: job["command"] for job in jobs if job["state"] == "Running"}


def read_while(server: Server, change: Callable[[], None], *, commands: set[str]) -> None:
    """Carry out `change` until each reader was answered often while each of `commands` was under way."""
    readers = [Reader(server, command) for command in READERS]
    try:
        for _ in range(ATTEMPTS):
            change()
            if all(reader.beside[command] >= OFTEN for reader in readers for command in commands):
                break
    finally:
        for reader in readers:
            reader.stop()
    for reader in readers:
        assert all(reader.beside[command] >= OFTEN for command in commands), reader.beside


@pytest.mark.qemu
def test_readers_are_answered_while_the_vm_boots_and_shuts_down(server: Server, tmp_path: Path) -> None:
    server.vmm.put("vm.create", bare_config(choose_engine("qemu"), tmp_path))

    def change() -> None:
        server.vmm.put("vm.boot")
        server.vmm.put("vm.shutdown")

    read_while(server, change, commands={"vm.boot", "vm.shutdown"})


@pytest.mark.qemu
def test_readers_are_answered_while_memory_is_dumped(server: Server, tmp_path: Path) -> None:
    booted(server, choose_engine("qemu"), tmp_path)
    core = tmp_path / "core"

    def change() -> None:
        core.unlink(missing_ok=True)
        server.vmm.put("vm.coredump", {"destination_url": f"file://{core}"})

    read_while(server, change, commands={"vm.coredump"})
    assert core.stat().st_size > 256 * 1024 * 1024


@pytest.mark.qemu
@pytest.mark.parametrize("command", ["vm.pause", "vm.power-button", "vm.nmi"])
def test_readers_are_answered_while_qemu_stands_still(server: Server, tmp_path: Path, command: str) -> None:
    booted(server, choose_engine("qemu"), tmp_path)
    qemu = qemu_of(server)
    stop_process(qemu)
    call = Call(server.socket_path, "PUT", command)
    for _ in range(20):
        for reader in READERS:
            server.vmm.get(reader)
    assert not call.is_over
    os.kill(qemu.pid, signal.SIGCONT)
    response = call.outcome(timeout_s=HOST_S)
    assert response is not None and response.status == 204


@pytest.mark.qemu
@pytest.mark.parametrize("command", ["vm.reboot", "vm.shutdown"])
def test_readers_are_answered_while_a_qemu_that_stands_still_is_ended(
    server: Server, tmp_path: Path, command: str
) -> None:
    booted(server, choose_engine("qemu"), tmp_path)
    stop_process(qemu_of(server))
    readers = [Reader(server, name) for name in READERS]
    response = Call(server.socket_path, "PUT", command).outcome(timeout_s=HOST_S)
    for reader in readers:
        reader.stop()
    assert response is not None and response.status == 204
    assert all(reader.beside[command] >= OFTEN for reader in readers)


@pytest.mark.qemu
def test_counters_of_a_qemu_that_stood_still_come_when_it_goes_on(server: Server, tmp_path: Path) -> None:
    booted(server, choose_engine("qemu"), tmp_path)
    qemu = qemu_of(server)
    stop_process(qemu)
    call = Call(server.socket_path, "GET", "vm.counters")
    spend(STILL_S, unless=lambda: call.is_over)
    os.kill(qemu.pid, signal.SIGCONT)
    response = call.outcome(timeout_s=HOST_S)
    assert response is not None and response.status == 200, response


@pytest.mark.qemu
def test_counters_that_many_wait_for_hold_up_nobody_else(server: Server, tmp_path: Path) -> None:
    booted(server, choose_engine("qemu"), tmp_path)
    qemu = qemu_of(server)
    stop_process(qemu)
    calls = [Call(server.socket_path, "GET", "vm.counters") for _ in range(5)]
    for reader in READERS:
        server.vmm.get(reader)
    assert not any(call.is_over for call in calls)
    os.kill(qemu.pid, signal.SIGCONT)
    assert [call.outcome(timeout_s=HOST_S).status for call in calls] == [200] * 5
