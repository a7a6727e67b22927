"""A fake machine whose payload and disk are there, with both ends of its console."""

from __future__ import annotations

import socket

import pytest

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import ConsoleSink, MachineSpec, SinkKind
from cloudvmm.engine.fake import FakeEngine
from support.deadline import HOST_S


@pytest.fixture
def console_ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(HOST_S)
        yield ours, theirs


@pytest.fixture
def serial_file(tmp_path):
    path = tmp_path / "serial"
    path.write_bytes(b"before\n")
    return path


@pytest.fixture
def spec(tmp_path, console_ends, serial_file):
    (tmp_path / "kernel").write_bytes(b"a kernel")
    (tmp_path / "disk").write_bytes(bytes(4096))
    return MachineSpec(
        vm_config=VmConfig(
            memory=MemoryConfig(size=64 * MIB),
            payload=PayloadConfig(kernel=str(tmp_path / "kernel")),
            disks=[DiskConfig(id="_disk0", path=str(tmp_path / "disk"))],
            net=[NetConfig(id="_net1")],
        ),
        slots={"_disk0": 1, "_net1": 2},
        serial=ConsoleSink(kind=SinkKind.FILE, path=str(serial_file)),
        console=ConsoleSink(kind=SinkKind.STREAM, stream_fd=console_ends[1].fileno()),
        debug_console=ConsoleSink(kind=SinkKind.OFF),
    )


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def machine(engine, spec):
    machine = engine.build(spec)
    yield machine
    machine.kill()
    machine.close()


@pytest.fixture
def running(machine):
    machine.boot()
    machine.take_events()
    return machine
