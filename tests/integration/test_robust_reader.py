"""Readers are answered while somebody else's command changes the VM. How fast is what `benches/` shows."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from support.attack import Call, bare_config, booted, find_qemu, qemu_of, read_time_s, stop_process
from support.deadline import HOST_S
from support.server import Server
from support.vm import EngineChoice, choose_engine

READ_LIMIT_S = 1.0
READERS = ("vmm.ping", "vm.info")


class Reader:
    """Asks without pause, in a thread of its own, until it is stopped; keeps how long each answer took."""

    def __init__(self, server: Server, command: str) -> None:
        self.times_s: list[float] = []
        self.failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(server, command))
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.failure is None, self.failure

    def _run(self, server: Server, command: str) -> None:
        try:
            with server.vmm.connect() as client:
                while not self._stop.is_set():
                    started = time.monotonic()
                    reply = client.ask("GET", command)
                    self.times_s.append(time.monotonic() - started)
                    assert reply.status == 200, reply.raw
        except Exception as error:
            self.failure = error


def read_while(server: Server, change: Any) -> None:
    """Carry out `change` while both readers ask; each must get many answers, each in time."""
    readers = [Reader(server, command) for command in READERS]
    try:
        change()
    finally:
        for reader in readers:
            reader.stop()
    for reader in readers:
        assert len(reader.times_s) >= 5
        assert max(reader.times_s) < READ_LIMIT_S


@pytest.mark.qemu
def test_readers_are_answered_while_the_vm_boots_and_shuts_down(server: Server, tmp_path: Path) -> None:
    server.vmm.put("vm.create", bare_config(choose_engine("qemu"), tmp_path))

    def change() -> None:
        for _ in range(3):
            server.vmm.put("vm.boot")
            server.vmm.put("vm.shutdown")

    read_while(server, change)


@pytest.mark.qemu
def test_readers_are_answered_while_memory_is_dumped(server: Server, tmp_path: Path) -> None:
    booted(server, choose_engine("qemu"), tmp_path)
    core = tmp_path / "core"
    read_while(server, lambda: server.vmm.put("vm.coredump", {"destination_url": f"file://{core}"}))
    assert core.stat().st_size > 256 * 1024 * 1024


@pytest.mark.qemu
@pytest.mark.parametrize("command", ["vm.pause", "vm.power-button", "vm.nmi", "vm.reboot", "vm.shutdown"])
def test_readers_are_answered_while_qemu_stands_still(server: Server, tmp_path: Path, command: str) -> None:
    booted(server, choose_engine("qemu"), tmp_path)
    qemu = qemu_of(server)
    stop_process(qemu)
    call = Call(server.socket_path, "PUT", command)
    for _ in range(20):
        for reader in READERS:
            assert read_time_s(server, reader) < READ_LIMIT_S
    if not call.is_over and find_qemu(server) == qemu:
        os.kill(qemu.pid, signal.SIGCONT)
    response = call.outcome(timeout_s=HOST_S)
    assert response is not None and response.status == 204


def test_counters_that_never_come_hold_up_nobody_else(
    fake_engine: EngineChoice, server: Server, tmp_path: Path
) -> None:
    booted(server, fake_engine, tmp_path)
    calls = [Call(server.socket_path, "GET", "vm.counters") for _ in range(5)]
    assert read_time_s(server, "vmm.ping") < READ_LIMIT_S
    assert [call.outcome(timeout_s=5).status for call in calls] == [200] * 5
