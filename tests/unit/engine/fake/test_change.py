"""Does the fake machine change as it is told, and its guest follow when it is willing?"""

from __future__ import annotations

import msgspec
import pytest

from cloudvmm.config.device import BalloonConfig, PmemConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import HotplugMethod, MemoryZoneConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.number import MIB
from cloudvmm.engine.base import (
    BalloonChanged,
    DeviceError,
    DeviceRemoved,
    DriverChanged,
    EngineError,
    ModuleTaken,
    PciChanged,
    RemovalPending,
    SlotError,
    VcpusChanged,
    VcpusRemoved,
    ZoneChanged,
)
from cloudvmm.engine.image import ImageTypeMismatch

RAM_BYTES = 64 * MIB

LET_GO = [DriverChanged("_net1", is_active=False), DeviceRemoved("_net1"), PciChanged()]


@pytest.fixture
def spec(spec):
    vm_config = spec.vm_config
    vm_config.cpus.boot_vcpus, vm_config.cpus.max_vcpus = 2, 4
    vm_config.balloon = BalloonConfig(size=0)
    vm_config.memory.hotplug_method = HotplugMethod.VIRTIO_MEM
    vm_config.memory.hotplug_size = 256 * MIB
    return msgspec.structs.replace(spec, slots={**spec.slots, "mem0": 3, "__balloon": 4})


def test_added_disk_is_there_with_its_type_and_counts_from_then_on(running, tmp_path):
    image = tmp_path / "new"
    image.write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    running.add_device(DiskConfig(id="new", path=str(image)), 9)
    assert running.image_types["new"] is ImageType.QCOW2
    assert running.counters()["new"]["read_ops"] == 0
    assert running.pci_resources()["new"]
    assert running.take_events() == [PciChanged(), DriverChanged("new", is_active=True)]


@pytest.mark.parametrize(
    ("device", "slot", "error"),
    [
        (NetConfig(id="new"), 2, SlotError),
        (NetConfig(id="new"), 0, SlotError),
        (NetConfig(id="_net1"), 9, DeviceError),
        (NetConfig(), 9, DeviceError),
        (DiskConfig(id="new", path="/no/such/image"), 9, DeviceError),
    ],
)
def test_device_that_cannot_be_added_changes_nothing(running, device, slot, error):
    before = running.pci_resources()
    with pytest.raises(error):
        running.add_device(device, slot)
    assert running.pci_resources() == before
    assert running.take_events() == []


@pytest.fixture
def pmem_folder(tmp_path):
    folder = tmp_path / "pmem"
    folder.mkdir()
    return folder


def test_pmem_in_a_folder_is_there_from_the_build_on_and_leaves_no_file(engine, spec, pmem_folder):
    spec.vm_config.pmem = [PmemConfig(id="p", file=str(pmem_folder), size=2 * MIB)]
    machine = engine.build(msgspec.structs.replace(spec, slots={**spec.slots, "p": 9}))
    machine.boot()
    assert machine.pci_resources()["p"]
    machine.close()
    assert list(pmem_folder.iterdir()) == []


def test_pmem_in_a_folder_is_added_and_leaves_no_file(running, pmem_folder):
    running.add_device(PmemConfig(id="p", file=str(pmem_folder), size=2 * MIB), 9)
    assert running.take_events() == [PciChanged(), DriverChanged("p", is_active=True)]
    assert list(pmem_folder.iterdir()) == []


def test_pmem_in_a_folder_that_is_only_read_is_refused_as_in_the_reference(running, pmem_folder):
    with pytest.raises(DeviceError, match="cannot be opened"):
        running.add_device(PmemConfig(id="p", file=str(pmem_folder), size=2 * MIB, discard_writes=True), 9)
    assert "p" not in running.pci_resources()


def test_image_of_another_type_than_said_is_refused(running, tmp_path):
    image = tmp_path / "raw"
    image.write_bytes(bytes(512))
    with pytest.raises(ImageTypeMismatch, match="specified = qcow2, detected = raw"):
        running.add_device(DiskConfig(id="new", path=str(image), image_type=ImageType.QCOW2), 9)


def test_guest_lets_go_of_a_device_at_once_and_its_slot_is_free(running):
    running.remove_device("_net1")
    assert running.take_events() == LET_GO
    assert "_net1" not in running.counters()
    running.add_device(NetConfig(id="next"), 2)


def test_paused_guest_lets_go_when_it_runs_again(running):
    running.pause()
    running.remove_device("_net1")
    assert running.take_events() == []
    running.resume()
    assert running.take_events() == LET_GO


def test_guest_that_refuses_keeps_the_device_until_it_obeys(running):
    running.guest.refuse("device")
    running.remove_device("_net1")
    running.remove_device("_net1")
    assert running.take_events() == []
    assert "_net1" in running.counters()
    running.guest.obey("device")
    assert running.take_events() == LET_GO


def test_unknown_device_is_not_removed(running):
    with pytest.raises(DeviceError, match="no device x"):
        running.remove_device("x")


def test_vcpus_come_at_once_and_go_when_the_guest_lets_them(running):
    running.resize_vcpus(4)
    assert running.take_events() == [VcpusChanged(4)]
    running.resize_vcpus(1)
    assert running.take_events() == [VcpusChanged(1), VcpusRemoved(1)]


def test_second_change_of_vcpus_waits_for_the_guest(running):
    running.guest.refuse("vcpus")
    running.resize_vcpus(1)
    with pytest.raises(RemovalPending):
        running.resize_vcpus(3)
    running.guest.obey("vcpus")
    assert running.take_events() == [VcpusChanged(1), VcpusRemoved(1)]
    running.resize_vcpus(3)


@pytest.mark.parametrize("vcpus", [0, 5])
def test_vcpus_beyond_the_machine_are_refused(running, vcpus):
    with pytest.raises(EngineError, match="room for 1 to 4"):
        running.resize_vcpus(vcpus)


def test_zone_follows_and_the_newest_request_counts(running):
    running.request_zone_size("mem0", 4 * MIB)
    assert running.take_events() == [ZoneChanged("mem0", 4 * MIB)]
    running.guest.refuse("zone")
    running.request_zone_size("mem0", 8 * MIB)
    running.request_zone_size("mem0", 6 * MIB)
    assert running.take_events() == []
    running.guest.obey("zone")
    assert running.take_events() == [ZoneChanged("mem0", 6 * MIB)]


def test_zone_without_a_device_is_refused(running):
    with pytest.raises(DeviceError, match="no virtio-mem device"):
        running.request_zone_size("other", 2 * MIB)


def test_balloon_takes_from_what_booted_and_what_was_plugged(running):
    running.resize_balloon(16 * MIB)
    assert running.take_events() == [BalloonChanged(RAM_BYTES - 16 * MIB)]
    running.add_memory(128 * MIB)
    running.resize_balloon(16 * MIB)
    assert running.take_events() == [ModuleTaken(0), BalloonChanged(RAM_BYTES + 112 * MIB)]


def test_machine_without_a_balloon_refuses(engine, spec):
    spec.vm_config.balloon = None
    machine = engine.build(spec)
    machine.boot()
    with pytest.raises(DeviceError, match="no balloon"):
        machine.resize_balloon(1)
    machine.close()


def test_guest_that_boots_follows_balloon_and_zones_of_its_config(engine, spec):
    spec.vm_config.balloon.size = 16 * MIB
    spec.vm_config.memory.size = 0
    spec.vm_config.memory.hotplug_size = None
    spec.vm_config.memory.zones = [
        MemoryZoneConfig(id="mem0", size=RAM_BYTES, hotplug_size=128 * MIB, hotplugged_size=2 * MIB)
    ]
    machine = engine.build(spec)
    machine.boot()
    assert [event for event in machine.take_events()[1:] if not isinstance(event, DriverChanged)] == [
        BalloonChanged(RAM_BYTES - 16 * MIB),
        ZoneChanged("mem0", 2 * MIB),
    ]
    machine.close()


def test_resized_disk_has_its_new_size(running, spec):
    running.resize_disk("_disk0", 8192)
    with open(spec.vm_config.disks[0].path, "rb") as image:
        assert len(image.read()) == 8192


def test_disk_that_is_not_raw_or_not_there_keeps_its_size(running, tmp_path):
    image = tmp_path / "q"
    image.write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    running.add_device(DiskConfig(id="q", path=str(image)), 9)
    for disk_id in ("q", "_net1", "none"):
        with pytest.raises(DeviceError):
            running.resize_disk(disk_id, 8192)
    assert image.stat().st_size == 4096


@pytest.mark.parametrize("call", ["add_memory", "resize_vcpus", "resize_balloon"])
def test_machine_that_was_not_booted_cannot_change(machine, call):
    with pytest.raises(EngineError, match="is built"):
        getattr(machine, call)(1)
