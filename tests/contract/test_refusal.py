"""What an engine refuses, when, with which error, and that nothing is left behind."""

from __future__ import annotations

import copy

import msgspec
import pytest

from cloudvmm.engine.base import DeviceError, PayloadError, SlotError
from support.leak import Holdings


@pytest.fixture
def warm(engine, spec):
    """What an engine keeps from its first build on (a thread that spawns, say) is no leak."""
    engine.build(spec).close()


def with_config(spec, **changes):
    vm_config = copy.deepcopy(spec.vm_config)
    for name, value in changes.items():
        setattr(vm_config, name, value)
    return msgspec.structs.replace(spec, vm_config=vm_config)


@pytest.fixture
def without_kernel(spec, tmp_path):
    payload = copy.copy(spec.vm_config.payload)
    payload.kernel = str(tmp_path / "no-such-kernel")
    return with_config(spec, payload=payload)


@pytest.fixture
def without_initramfs(spec, tmp_path):
    payload = copy.copy(spec.vm_config.payload)
    payload.initramfs = str(tmp_path / "no-such-initramfs")
    return with_config(spec, payload=payload)


@pytest.fixture
def without_disk(spec, tmp_path):
    disk = copy.copy(spec.vm_config.disks[0])
    disk.path = str(tmp_path / "no-such-disk")
    return with_config(spec, disks=[disk])


def test_missing_kernel_is_refused_by_boot_and_the_machine_stays_built(engine, without_kernel, warm):
    before = Holdings()
    machine = engine.build(without_kernel)
    with pytest.raises(PayloadError):
        machine.boot()
    assert machine.counters()
    machine.close()
    before.assert_nothing_added()


def test_kernel_that_no_path_can_name_is_refused_by_boot(engine, spec, warm):
    payload = copy.copy(spec.vm_config.payload)
    payload.kernel = "/a\0b"
    machine = engine.build(with_config(spec, payload=payload))
    with pytest.raises(PayloadError):
        machine.boot()
    machine.close()


def test_missing_initramfs_is_refused_by_boot(engine, without_initramfs, warm):
    machine = engine.build(without_initramfs)
    with pytest.raises(PayloadError):
        machine.boot()
    machine.close()


def test_empty_kernel_is_refused_by_boot(engine, spec, tmp_path, warm):
    kernel = tmp_path / "empty"
    kernel.touch()
    payload = copy.copy(spec.vm_config.payload)
    payload.kernel = str(kernel)
    machine = engine.build(with_config(spec, payload=payload))
    with pytest.raises(PayloadError):
        machine.boot()
    machine.close()


def test_missing_disk_is_refused_by_build_and_nothing_is_left(engine, without_disk, warm):
    before = Holdings()
    with pytest.raises(DeviceError):
        engine.build(without_disk)
    before.assert_nothing_added()


def test_folder_as_disk_is_refused_by_build(engine, spec, tmp_path, warm):
    disk = copy.copy(spec.vm_config.disks[0])
    disk.path = str(tmp_path)
    before = Holdings()
    with pytest.raises(DeviceError):
        engine.build(with_config(spec, disks=[disk]))
    before.assert_nothing_added()


def test_two_devices_in_one_slot_are_refused_by_build(engine, spec, warm):
    first = engine.info.first_slot
    before = Holdings()
    with pytest.raises(SlotError):
        engine.build(msgspec.structs.replace(spec, slots=dict.fromkeys(spec.slots, first)))
    before.assert_nothing_added()


def test_slot_out_of_range_is_refused_by_build(engine, spec, warm):
    slots = spec.slots | {"__rng": engine.info.last_slot + 1}
    with pytest.raises(SlotError):
        engine.build(msgspec.structs.replace(spec, slots=slots))


def test_config_is_neither_changed_nor_kept(engine, spec):
    before = copy.deepcopy(spec.vm_config)
    machine = engine.build(spec)
    spec.vm_config.payload.kernel = "/no/such/kernel"
    machine.boot()
    machine.close()
    spec.vm_config.payload.kernel = before.payload.kernel
    assert spec.vm_config == before


def test_ten_lives_leave_nothing(engine, spec, warm):
    before = Holdings()
    for _ in range(10):
        machine = engine.build(spec)
        machine.boot()
        machine.close()
    before.assert_nothing_added()
