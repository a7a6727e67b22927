"""The ladder of the contract suite: engine, spec, machine_built, machine_running, machine_paused."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, SerialConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import ConsoleSink, Engine, Machine, MachineSpec, SinkKind
from support.player import PLAYERS, FakePlayer, QemuPlayer

RAM_BYTES = 256 * MIB
DISK_BYTES = 1 * MIB
DISK_ID = "_disk0"


@pytest.fixture(scope="module", params=["fake", pytest.param("qemu", marks=pytest.mark.qemu)])
def engine_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(engine_name: str) -> Engine:
    """One engine per module: what it finds out once is not found out per test."""
    return PLAYERS[engine_name].engine()


@pytest.fixture
def player(engine_name: str, tmp_path: Path) -> Iterator[FakePlayer | QemuPlayer]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield PLAYERS[engine_name](ours, theirs, tmp_path)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    return image


@pytest.fixture
def spec(engine: Engine, player: FakePlayer | QemuPlayer, disk: Path) -> MachineSpec:
    """A small VM: one disk, an entropy source, a console that is ours and a serial port nobody listens to."""
    first = engine.info.first_slot
    return MachineSpec(
        vm_config=VmConfig(
            memory=MemoryConfig(size=RAM_BYTES),
            payload=player.payload,
            disks=[DiskConfig(id=DISK_ID, path=str(disk), image_type=ImageType.RAW)],
            serial=SerialConfig(mode=ConsoleOutputMode.NULL),
            console=ConsoleConfig(mode=ConsoleOutputMode.PTY),
        ),
        slots={"__console": first, DISK_ID: first + 1, "__rng": first + 2},
        serial=ConsoleSink(kind=SinkKind.NULL),
        console=ConsoleSink(kind=SinkKind.STREAM, stream_fd=player.guest_end.fileno()),
        debug_console=ConsoleSink(kind=SinkKind.OFF),
    )


@pytest.fixture
def machine_built(engine: Engine, spec: MachineSpec) -> Iterator[Machine]:
    machine = engine.build(spec)
    yield machine
    machine.kill()
    machine.close()


@pytest.fixture
def machine_running(machine_built: Machine) -> Machine:
    """Its vCPUs run; whether the guest answers yet is the player's to say."""
    machine_built.boot()
    return machine_built


@pytest.fixture
def machine_paused(machine_running: Machine) -> Machine:
    machine_running.pause()
    return machine_running
