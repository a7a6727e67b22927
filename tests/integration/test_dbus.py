"""The whole program on a private message bus, driven by busctl alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.bus import OBJECT, SERVICE, PrivateBus, dbus_monitor
from support.deadline import GUEST_S
from support.server import Server
from support.vm import EngineChoice, Guest

ServerFactory = Callable[..., Server]
FLAGS = ("--dbus-service-name", SERVICE, "--dbus-object-path", OBJECT)


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateBus]:
    private = PrivateBus(tmp_path / "b")
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", private.address)
    yield private
    private.close()


@pytest.mark.qemu
def test_guest_boots_runs_and_ends_by_busctl(
    bus: PrivateBus,
    cloudvmm_server: ServerFactory,
    engine_choice: EngineChoice,
    vm_config: dict[str, Any],
) -> None:
    server = cloudvmm_server(*FLAGS)
    bus.call("VmCreate", json.dumps(vm_config))
    with contextlib.closing(dbus_monitor(bus)) as monitor:
        with contextlib.closing(Guest(server.vmm, engine_choice)) as guest:
            bus.call("VmBoot")
            guest.wait_ready()
            (info,) = bus.call("VmInfo")
            assert json.loads(info)["state"] == "Running"
            assert guest.shell.run("echo hello", timeout_s=GUEST_S) == (0, b"hello\n")
            (counters,) = bus.call("VmCounters")
            assert json.loads(counters) == server.vmm.get("vm.counters")
            bus.call("VmPause")
            bus.call("VmResume")
        assert bus.call("VmmShutdown") == []
        assert server.wait_end() == 0
        seen = monitor.read_until('"source": "vmm",\n  "event": "shutdown"')
    order = [f'"event": "{name}"' for name in ("booting", "booted", "paused", "resumed", "deleted")]
    assert sorted(order, key=seen.index) == order


def test_program_whose_name_is_taken_ends_with_the_reason(
    bus: PrivateBus, cloudvmm_server: ServerFactory, fake_engine: EngineChoice
) -> None:
    cloudvmm_server(*FLAGS)
    second = cloudvmm_server(*FLAGS, ready=False)
    second.expected_status = 1
    second.wait_end()
    assert second.stderr.endswith(
        "Error: Cloud Hypervisor exited with the following chain of errors:\n"
        "  0: Failed to start the VMM thread\n"
        "  1: Error starting D-Bus session\n"
        "  2: name already taken on the bus\n"
    )


def test_program_with_half_the_names_ends_with_the_reason(
    cloudvmm_server: ServerFactory, fake_engine: EngineChoice
) -> None:
    server = cloudvmm_server("--dbus-object-path", OBJECT, ready=False)
    server.expected_status = 1
    server.wait_end()
    assert "`--dbus-service-name` option isn't provided" in server.stderr


def test_program_outlives_its_bus(
    bus: PrivateBus, cloudvmm_server: ServerFactory, fake_engine: EngineChoice
) -> None:
    server = cloudvmm_server(*FLAGS)
    bus.daemon.kill()
    bus.daemon.wait()
    assert server.vmm.get("vmm.ping")["pid"] == server.pid
    server.vmm.put("vmm.shutdown")
    assert server.wait_end() == 0
