"""Many lives of a VM in one server leave nothing in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from support.attack import Held, assert_holds_no_more, bare_config, has_interface, see_out
from support.deadline import HOST_S
from support.server import Server
from support.vm import EngineChoice, choose_engine
from support.wait import wait_until

FAKE_CYCLES = [200]
QEMU_CYCLES = [30]


def live_once(server: Server, config: dict[str, Any]) -> None:
    server.vmm.put("vm.create", config)
    server.vmm.put("vm.boot")
    assert server.vmm.get("vm.info")["state"] == "Running"
    server.vmm.get("vm.counters")
    server.vmm.put("vm.shutdown")
    server.vmm.put("vm.delete")


def live_often(server: Server, config: dict[str, Any], cycles: int) -> None:
    live_once(server, config)  # what is made once and kept is no leak
    before, files = Held(server.pid), set(os.listdir(server.folder))
    for _ in range(cycles):
        live_once(server, config)
    assert_holds_no_more(server.pid, before)
    assert set(os.listdir(server.folder)) == files


def all_consoles(folder: Path) -> dict[str, Any]:
    return {
        "serial": {"mode": "Socket", "socket": str(folder / "serial.sock")},
        "console": {"mode": "Pty"},
        "debug_console": {"mode": "File", "file": str(folder / "debug.log")},
    }


@pytest.mark.parametrize("cycles", FAKE_CYCLES)
def test_cycles_on_the_fake_engine_leave_nothing(
    fake_engine: EngineChoice, server: Server, tmp_path: Path, cycles: int
) -> None:
    live_often(server, bare_config(fake_engine, tmp_path, **all_consoles(tmp_path)), cycles)


@pytest.mark.qemu
@pytest.mark.parametrize("cycles", QEMU_CYCLES)
def test_cycles_on_qemu_leave_nothing(server: Server, tmp_path: Path, cycles: int) -> None:
    image = tmp_path / "disk.raw"
    image.touch()
    os.truncate(image, 1 << 20)
    config = bare_config(choose_engine("qemu"), tmp_path, **all_consoles(tmp_path))
    live_often(server, {**config, "disks": [{"path": str(image), "image_type": "Raw"}]}, cycles)


@pytest.mark.parametrize("cycles", FAKE_CYCLES)
def test_boots_that_fail_leave_nothing(
    fake_engine: EngineChoice, server: Server, tmp_path: Path, cycles: int
) -> None:
    config = bare_config(fake_engine, tmp_path, disks=[{"path": str(tmp_path / "missing")}])

    def fail_once() -> None:
        server.vmm.put("vm.create", config)
        server.vmm.put("vm.boot", expect=500)
        server.vmm.put("vm.delete")

    fail_once()
    before = Held(server.pid)
    for _ in range(cycles):
        fail_once()
    assert_holds_no_more(server.pid, before)


@pytest.mark.parametrize("cycles", FAKE_CYCLES)
def test_clients_that_come_and_go_leave_nothing(
    fake_engine: EngineChoice, server: Server, cycles: int
) -> None:
    read, write = os.pipe()
    try:
        with server.vmm.connect() as client:  # the descriptors are not wanted: they must be closed
            client.ask("GET", "vmm.ping", fds=[read, write] * 5)
        before = Held(server.pid)
        for number in range(cycles):
            with server.vmm.connect() as client:
                head = b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9\r\n"
                client.send(head[: number % len(head) + 1], fds=[read])
                see_out(client)
        assert_holds_no_more(server.pid, before)
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.root
@pytest.mark.qemu
def test_tap_goes_with_its_vm(server: Server, tmp_path: Path) -> None:
    config = bare_config(choose_engine("qemu"), tmp_path, net=[{"tap": "rbst0", "mac": "52:54:00:00:00:77"}])
    server.vmm.put("vm.create", config)
    for _ in range(2):
        server.vmm.put("vm.boot")
        assert has_interface("rbst0")
        server.vmm.put("vm.shutdown")
        wait_until(lambda: not has_interface("rbst0"), "the interface is gone", timeout_s=HOST_S)
