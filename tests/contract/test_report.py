"""What an engine tells of itself and of a machine: properties, counters, PCI, core dumps."""

from __future__ import annotations

import struct

import pytest

from cloudvmm.engine.base import DriverChanged, MachineGone
from support.deadline import GUEST_S
from support.wait import wait_event, wait_until

DISK_COUNTERS = {
    "read_bytes",
    "write_bytes",
    "read_ops",
    "write_ops",
    "read_latency_min",
    "read_latency_max",
    "read_latency_avg",
    "write_latency_min",
    "write_latency_max",
    "write_latency_avg",
}


def test_info_is_whole(engine):
    assert engine.info.name
    assert engine.info.version
    assert engine.info.accelerator
    assert 0 < engine.info.first_slot < engine.info.last_slot <= 31
    assert engine.info.max_vcpus >= 1


def test_counters_of_a_disk_have_the_known_names(machine_built):
    counters = machine_built.counters()
    assert set(counters) == {"_disk0"}
    assert set(counters["_disk0"]) == DISK_COUNTERS


def test_counters_before_the_first_request(machine_built):
    counters = machine_built.counters()["_disk0"]
    assert counters["read_ops"] == counters["write_ops"] == 0
    assert counters["read_latency_min"] == counters["read_latency_max"] == 18446744073709551615
    assert counters["read_latency_avg"] == 1844674407370955


def test_counters_grow_with_what_the_guest_reads(machine_running, player):
    player.wait_ready()
    player.read_disk()
    wait_until(
        lambda: machine_running.counters()["_disk0"]["read_bytes"] >= 4096,
        "the guest's reads in the counters",
        timeout_s=GUEST_S,
    )
    counters = machine_running.counters()["_disk0"]
    assert counters["read_ops"] > 0
    assert counters["read_latency_min"] <= counters["read_latency_avg"] <= counters["read_latency_max"]


def test_every_device_has_bars_once_the_guest_runs(machine_running, spec, player):
    player.wait_ready()
    resources = machine_running.pci_resources()
    assert set(resources) == set(spec.slots)
    bars = [bar for bars in resources.values() for bar in bars]
    assert len(bars) >= len(spec.slots)
    assert all(bar.base > 0 and bar.size > 0 and 0 <= bar.index <= 5 for bar in bars)


def test_readers_fail_once_the_machine_is_gone(machine_running):
    machine_running.kill()
    with pytest.raises(MachineGone):
        machine_running.counters()
    with pytest.raises(MachineGone):
        machine_running.pci_resources()


def test_coredump_of_a_paused_guest_is_an_elf_core(machine_running, player, spec, tmp_path):
    player.wait_ready()  # before its kernel runs, a guest is no 64-bit machine yet
    machine_running.pause()
    path = tmp_path / "core"
    with path.open("xb") as file:
        machine_running.coredump(file.fileno())
    with path.open("rb") as file:
        header = file.read(64)
        magic, elf_class, elf_type, machine = struct.unpack_from("<4sB11xHH", header)
        (first,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        file.seek(first)
        programs = [file.read(size) for _ in range(count)]
    assert (magic, elf_class, elf_type, machine) == (b"\x7fELF", 2, 4, 62)
    kinds = [struct.unpack_from("<I", program)[0] for program in programs]
    assert 4 in kinds
    loads = [program for program, kind in zip(programs, kinds, strict=True) if kind == 1]
    in_file = sum(struct.unpack_from("<Q", program, 32)[0] for program in loads)
    assert in_file >= spec.vm_config.memory.size
    assert path.stat().st_size >= in_file


def test_each_virtio_device_is_reported_once_its_driver_is_up(machine_running, player, spec):
    player.wait_ready()
    active = set()
    while active != set(spec.slots):
        events = wait_event(machine_running, DriverChanged, timeout_s=GUEST_S)
        changes = [event for event in events if isinstance(event, DriverChanged)]
        active |= {change.device_id for change in changes if change.is_active}
        active -= {change.device_id for change in changes if not change.is_active}
    assert active == {"__console", "__rng", "_disk0"}
