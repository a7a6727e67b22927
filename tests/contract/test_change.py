"""Does a machine that runs change as `engine.base` says, wholly or not at all?"""

from __future__ import annotations

import copy
import time

import msgspec
import pytest

from cloudvmm.config.cpu import CpusConfig
from cloudvmm.config.device import BalloonConfig
from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import HotplugMethod
from cloudvmm.config.number import MIB
from cloudvmm.engine.base import (
    BalloonChanged,
    DeviceError,
    DeviceRemoved,
    EngineError,
    RemovalPending,
    SlotError,
    VcpusRemoved,
    ZoneChanged,
)
from support.deadline import GUEST_S
from support.wait import wait_event, wait_until

from .conftest import DISK_BYTES, DISK_ID, RAM_BYTES


@pytest.fixture
def spec(spec, engine):
    """Room for everything: two vCPUs of four, modules, a balloon."""
    vm_config = copy.deepcopy(spec.vm_config)
    vm_config.cpus = CpusConfig(boot_vcpus=2, max_vcpus=4)
    vm_config.memory.hotplug_size = 1024 * MIB
    vm_config.balloon = BalloonConfig(size=0)
    slots = {**spec.slots, "__balloon": engine.info.first_slot + 3}
    return msgspec.structs.replace(spec, vm_config=vm_config, slots=slots)


@pytest.fixture
def new_disk(tmp_path):
    image = tmp_path / "new.raw"
    image.write_bytes(bytes(DISK_BYTES))
    return DiskConfig(id="new", path=str(image))


@pytest.fixture
def free_slot(engine):
    return engine.info.last_slot


def test_added_disk_is_found_out_counted_and_placed(machine_running, new_disk, free_slot):
    machine_running.add_device(new_disk, free_slot)
    assert machine_running.image_types["new"] is ImageType.RAW
    assert "new" in machine_running.counters()
    assert "new" in machine_running.pci_resources()


def test_slot_of_a_device_that_is_there_is_not_unsettled(machine_running, new_disk, free_slot):
    machine_running.add_device(new_disk, free_slot)
    assert machine_running.unsettled_slots == frozenset()


def test_device_is_added_to_a_paused_machine(machine_paused, new_disk, free_slot):
    machine_paused.add_device(new_disk, free_slot)
    assert "new" in machine_paused.counters()


def test_device_in_a_slot_in_use_is_refused_and_nothing_changes(machine_running, new_disk, spec):
    before = set(machine_running.counters())
    with pytest.raises(SlotError):
        machine_running.add_device(new_disk, spec.slots[DISK_ID])
    assert set(machine_running.counters()) == before


def test_disk_without_an_image_is_refused_and_nothing_changes(machine_running, free_slot, tmp_path):
    before = set(machine_running.counters())
    with pytest.raises(DeviceError):
        machine_running.add_device(DiskConfig(id="new", path=str(tmp_path / "none")), free_slot)
    assert set(machine_running.counters()) == before


def test_removed_device_is_reported_and_its_slot_and_id_are_free(machine_running, player, new_disk, spec):
    player.wait_ready()
    machine_running.remove_device(DISK_ID)
    events = wait_event(machine_running, DeviceRemoved, timeout_s=GUEST_S)
    assert DeviceRemoved(DISK_ID) in events
    assert DISK_ID not in machine_running.counters()
    new_disk.id = DISK_ID
    machine_running.add_device(new_disk, spec.slots[DISK_ID])


def test_removal_may_be_asked_for_again_and_is_reported_once(machine_running, player):
    player.wait_ready()
    machine_running.pause()
    machine_running.remove_device(DISK_ID)
    machine_running.remove_device(DISK_ID)
    machine_running.resume()
    events = wait_event(machine_running, DeviceRemoved, timeout_s=GUEST_S)
    assert events.count(DeviceRemoved(DISK_ID)) == 1


def test_vcpus_come_and_go(machine_running, player):
    player.wait_ready()
    machine_running.resize_vcpus(3)
    machine_running.resize_vcpus(1)
    assert VcpusRemoved(1) in wait_event(machine_running, VcpusRemoved, timeout_s=GUEST_S)
    machine_running.resize_vcpus(2)


def test_vcpus_that_the_guest_still_has_keep_others_from_changing(machine_running, player):
    player.wait_ready()
    machine_running.pause()
    machine_running.resize_vcpus(1)
    with pytest.raises(RemovalPending):
        machine_running.resize_vcpus(3)


def test_modules_can_be_plugged_one_after_another(machine_running):
    machine_running.add_memory(128 * MIB)
    machine_running.add_memory(256 * MIB)


def test_balloon_is_followed_and_tells_of_the_memory_that_the_guest_has(engine, spec, player):
    spec.vm_config.balloon.statistics = True
    machine = engine.build(spec)
    assert "__balloon" not in machine.counters()
    machine.boot()
    player.wait_ready()
    machine.resize_balloon(32 * MIB)
    events = wait_event(machine, BalloonChanged, timeout_s=GUEST_S)
    assert all(event.actual_bytes >= RAM_BYTES - 32 * MIB for event in _of(BalloonChanged, events))
    told = wait_until(
        lambda: machine.counters().get("__balloon"), "numbers of the balloon", timeout_s=GUEST_S
    )
    assert told["free_memory"] < told["available_memory"] < told["total_memory"] <= RAM_BYTES
    assert abs(told["last_update"] - time.time()) < GUEST_S
    machine.close()


def test_balloon_is_silent_where_nobody_asked(machine_running):
    assert set(machine_running.counters()) == {DISK_ID}


def test_zone_is_followed(engine, spec, player):
    spec.vm_config.memory.hotplug_method = HotplugMethod.VIRTIO_MEM
    slots = {**spec.slots, "mem0": engine.info.first_slot + 4}
    machine = engine.build(msgspec.structs.replace(spec, slots=slots))
    machine.boot()
    player.wait_ready()
    machine.request_zone_size("mem0", 128 * MIB)
    changed = _of(ZoneChanged, wait_event(machine, ZoneChanged, timeout_s=GUEST_S))
    assert all(event.zone_id == "mem0" and event.plugged_bytes <= 128 * MIB for event in changed)
    machine.close()


def test_resized_disk_has_its_new_size(machine_running, disk):
    machine_running.resize_disk(DISK_ID, 2 * DISK_BYTES)
    assert disk.stat().st_size == 2 * DISK_BYTES


def test_machine_that_does_not_run_yet_is_not_changed(machine_built, new_disk, free_slot):
    with pytest.raises(EngineError):
        machine_built.add_device(new_disk, free_slot)
    assert "new" not in machine_built.counters()


def test_device_that_is_not_there_cannot_be_removed_and_nothing_changes(machine_running):
    before = set(machine_running.counters())
    with pytest.raises(EngineError):
        machine_running.remove_device("none")
    assert set(machine_running.counters()) == before
    machine_running.pause()
    machine_running.resume()


def _of(kind, events):
    return [event for event in events if isinstance(event, kind)]
