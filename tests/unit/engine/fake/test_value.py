"""Are counters, BARs, core files and refusals what the documentation says?"""

from __future__ import annotations

import errno
import os
import struct
import sys

import msgspec
import pytest

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.engine.base import ConsoleSink, DeviceError, EngineError, PciBar, PciChanged, SinkKind
from cloudvmm.engine.fake.core import write_core
from cloudvmm.engine.fake.counter import device_counters
from cloudvmm.errors import error_chain
from support.leak import Holdings

UNUSED = (1 << 64) - 1


def test_counters_of_an_unused_disk():
    assert device_counters(DiskConfig(id="d"), 99) == {
        "read_bytes": 0,
        "write_bytes": 0,
        "read_ops": 0,
        "write_ops": 0,
        "read_latency_min": UNUSED,
        "read_latency_max": UNUSED,
        "read_latency_avg": 1844674407370955,
        "write_latency_min": UNUSED,
        "write_latency_max": UNUSED,
        "write_latency_avg": 1844674407370955,
    }


def test_counters_grow_with_guest_time():
    assert device_counters(NetConfig(id="n"), 2500) == {
        "rx_bytes": 128,
        "rx_frames": 2,
        "tx_bytes": 128,
        "tx_frames": 2,
    }
    disk = device_counters(DiskConfig(id="d"), 2500)
    assert (disk["read_ops"], disk["read_bytes"]) == (25, 25 * 4096)
    assert (disk["write_ops"], disk["write_bytes"]) == (2, 2 * 4096)
    assert (disk["read_latency_min"], disk["read_latency_avg"], disk["read_latency_max"]) == (50, 100, 150)


def test_readonly_disk_is_never_written():
    disk = device_counters(DiskConfig(id="d", readonly=True), 5000)
    assert disk["write_ops"] == 0
    assert disk["write_latency_min"] == UNUSED


def test_vhost_user_devices_report_nothing():
    assert device_counters(DiskConfig(id="d", vhost_user=True), 5000) is None
    assert device_counters(NetConfig(id="n", vhost_user=True), 5000) is None


def test_bars_appear_when_the_guest_boots(machine):
    assert machine.pci_resources() == {"_disk0": [], "_net1": []}
    machine.boot()
    assert machine.take_events()[0] == PciChanged()
    bar = PciBar(index=0, base=0x3800_0010_0000, size=0x80000, kind="Mmio64", prefetchable=False)
    assert machine.pci_resources()["_net1"] == [bar]


def test_core_is_written_where_the_descriptor_stands(tmp_path):
    path = tmp_path / "core"
    with path.open("wb") as file:
        file.write(b"before")
        file.flush()
        write_core(file.fileno(), vcpus=2, ram_bytes=1 << 30)
    with path.open("rb") as file:
        content = file.read(6 + 4096)[6:]
    assert content[:4] == b"\x7fELF"
    note, load = (struct.unpack_from("<IIQQQQQQ", content, 64 + 56 * index) for index in range(2))
    assert note[0] == 4
    assert note[5] == 2 * (12 + 8 + 336)
    assert (load[0], load[2], load[5]) == (1, 4096, 1 << 30)
    assert path.stat().st_size == 6 + 4096 + (1 << 30)
    assert path.stat().st_blocks * 512 < 1 << 20


def test_core_into_a_pipe_is_refused(running):
    reader, writer = os.pipe()
    running.pause()
    with pytest.raises(EngineError, match="core cannot be written"):
        running.coredump(writer)
    os.close(reader)
    os.close(writer)


def test_image_that_cannot_be_written_is_accepted_readonly_only(engine, spec):
    running_program = sys.executable  # nobody may write to it, not even root
    spec.vm_config.disks = [DiskConfig(id="_disk0", path=running_program, readonly=True)]
    engine.build(spec).close()
    spec.vm_config.disks[0].readonly = False
    with pytest.raises(DeviceError, match="Cannot open disk path") as refusal:
        engine.build(spec)
    assert error_chain(refusal.value)[1:] == [
        f"I/O error (path={running_program} op=open)",
        f"Text file busy (os error {errno.ETXTBSY})",
    ]


@pytest.mark.parametrize(
    "sink",
    [
        ConsoleSink(kind=SinkKind.FILE, path="/no/such/folder/console"),
        ConsoleSink(kind=SinkKind.STREAM, stream_fd=1_000_000),
    ],
)
def test_console_that_cannot_be_opened_is_refused_and_nothing_is_left(engine, spec, sink):
    before = Holdings()
    with pytest.raises(DeviceError):
        engine.build(msgspec.structs.replace(spec, console=sink))
    before.assert_nothing_added(timeout_s=0)
