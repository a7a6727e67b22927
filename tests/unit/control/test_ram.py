"""The arithmetic of resizing, row by row of lifecycle.md section 10."""

from __future__ import annotations

import pytest

from cloudvmm.api.error import VcpuRemovalPending
from cloudvmm.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig
from cloudvmm.config.number import MIB
from cloudvmm.control.error import (
    DesiredVcpuCountExceedsMax,
    DesiredVcpuCountIsZero,
    InsufficientHotplugRam,
    InvalidResizeBelowBootSize,
    InvalidResizeWithMemoryZones,
    InvalidSize,
    MissingVirtioMemHandler,
    NoSlotAvailable,
    VirtioMemResizeFail,
)
from cloudvmm.control.ram import GuestRam, Vcpus, Zone, check_above_boot, ram_of
from cloudvmm.errors import error_chain

GIB = 1024 * MIB


def acpi(hotplug_mib=2048):
    return ram_of(MemoryConfig(size=GIB, hotplug_size=hotplug_mib * MIB))


@pytest.mark.parametrize(
    ("desired_bytes", "module_bytes"),
    [
        (0, 0),
        (GIB - 1, 0),
        (GIB, 0),
        (GIB + 128 * MIB, 128 * MIB),
        (GIB + 2048 * MIB, 2048 * MIB),
    ],
)
def test_module_that_takes_ram_to_its_new_size(desired_bytes, module_bytes):
    assert acpi().module_bytes(desired_bytes) == module_bytes


@pytest.mark.parametrize(
    ("desired_bytes", "error"),
    [
        (GIB + 1, InvalidSize),
        (GIB + 127 * MIB, InvalidSize),
        (GIB + 2048 * MIB + 1, InvalidSize),
        (GIB + 2176 * MIB, InsufficientHotplugRam),
        ((1 << 64) - 128 * MIB, InsufficientHotplugRam),
    ],
)
def test_module_that_cannot_be(desired_bytes, error):
    with pytest.raises(error):
        acpi().module_bytes(desired_bytes)


def test_without_hotplug_size_there_is_no_room():
    with pytest.raises(InsufficientHotplugRam):
        ram_of(MemoryConfig(size=GIB)).module_bytes(GIB + 128 * MIB)


def test_there_are_eight_slots_and_they_come_before_the_size():
    ram = acpi()
    for _ in range(8):
        ram = ram.with_module(128 * MIB)
    assert ram.current_bytes == 2 * GIB
    with pytest.raises(NoSlotAvailable):
        ram.module_bytes(2 * GIB + 1)


def test_modules_share_one_room():
    ram = acpi(256).with_module(128 * MIB)
    assert ram.module_bytes(GIB + 256 * MIB) == 128 * MIB
    with pytest.raises(InsufficientHotplugRam):
        ram.module_bytes(GIB + 384 * MIB)


@pytest.mark.parametrize(
    ("memory", "zones"),
    [
        (MemoryConfig(size=GIB, hotplug_size=GIB), {}),
        (MemoryConfig(size=GIB, hotplug_method=HotplugMethod.VIRTIO_MEM), {}),
        (
            MemoryConfig(size=GIB, hotplug_method=HotplugMethod.VIRTIO_MEM, hotplug_size=GIB),
            {"mem0": Zone(GIB, 0)},
        ),
        (
            MemoryConfig(
                size=0,
                hotplug_method=HotplugMethod.VIRTIO_MEM,
                zones=[
                    MemoryZoneConfig(id="a", size=GIB),
                    MemoryZoneConfig(id="b", size=GIB, hotplug_size=GIB, hotplugged_size=MIB),
                ],
            ),
            {"b": Zone(GIB, MIB)},
        ),
    ],
)
def test_zones_that_have_a_virtio_mem_device(memory, zones):
    assert ram_of(memory).zones == zones


@pytest.mark.parametrize(
    ("requested_bytes", "why"),
    [
        (4 * MIB, "new size 0x400000 and requested_size are identical"),
        (GIB + 1, "new size 0x40000001 is bigger than region_size 0x40000000"),
        (3 * MIB, "new size 0x300000 is not aligned on block_size 0x200000"),
    ],
)
def test_what_a_virtio_mem_device_cannot_give(requested_bytes, why):
    ram = ram_of(MemoryConfig(size=GIB, hotplug_method=HotplugMethod.VIRTIO_MEM, hotplug_size=GIB))
    with pytest.raises(VirtioMemResizeFail) as caught:
        ram.with_zone("mem0", 4 * MIB).check_zone("mem0", requested_bytes)
    assert error_chain(caught.value) == [
        "Failed to virtio-mem resize",
        "Resize invalid argument",
        f"Failed to update virtio configuration: ResizeError({why})",
    ]


@pytest.mark.parametrize("requested_bytes", [0, 2 * MIB, GIB])
def test_what_a_virtio_mem_device_can_give(requested_bytes):
    ram = ram_of(MemoryConfig(size=GIB, hotplug_method=HotplugMethod.VIRTIO_MEM, hotplug_size=GIB))
    ram = ram.with_zone("mem0", 4 * MIB)
    ram.check_zone("mem0", requested_bytes)
    assert ram.with_zone("mem0", requested_bytes).zones["mem0"].requested_bytes == requested_bytes


def test_zone_without_a_device_has_no_handler():
    with pytest.raises(MissingVirtioMemHandler):
        acpi().check_zone("mem0", 2 * MIB)


def test_zones_of_the_user_have_sizes_of_their_own():
    with pytest.raises(InvalidResizeWithMemoryZones):
        ram_of(MemoryConfig(size=0, zones=[MemoryZoneConfig(id="a", size=GIB)])).check_resizable()
    acpi().check_resizable()


def test_boot_ram_cannot_be_taken_away():
    check_above_boot(GIB, GIB)
    with pytest.raises(InvalidResizeBelowBootSize, match=r"desired_size = 5 below boot size = 1073741824$"):
        check_above_boot(5, GIB)


@pytest.mark.parametrize(
    ("guest_ram", "actual_bytes"),
    [
        (GuestRam(), GIB),
        (GuestRam(balloon_bytes=MIB), GIB - MIB),
        (GuestRam(balloon_bytes=2 * GIB), 0),
        (GuestRam(balloon_bytes=2 * GIB, plugged={"a": 3 * MIB, "b": MIB}), 4 * MIB),
        (GuestRam(plugged={"a": MIB}), GIB + MIB),
    ],
)
def test_memory_actual_size(guest_ram, actual_bytes):
    assert guest_ram.actual_bytes(GIB) == actual_bytes


@pytest.mark.parametrize(
    ("vcpus", "desired", "is_change"),
    [
        (Vcpus(2), 2, False),
        (Vcpus(2), 4, True),
        (Vcpus(2), 1, True),
        (Vcpus(2, is_removing=True), 2, False),
    ],
)
def test_vcpus_that_can_be(vcpus, desired, is_change):
    assert vcpus.is_change(desired, 4) is is_change


@pytest.mark.parametrize(
    ("vcpus", "desired", "error"),
    [
        (Vcpus(2), 0, DesiredVcpuCountIsZero),
        (Vcpus(2), 5, DesiredVcpuCountExceedsMax),
        (Vcpus(2, is_removing=True), 0, DesiredVcpuCountIsZero),
        (Vcpus(2, is_removing=True), 1, VcpuRemovalPending),
        (Vcpus(2, is_removing=True), 5, VcpuRemovalPending),
    ],
)
def test_vcpus_that_cannot_be(vcpus, desired, error):
    with pytest.raises(error):
        vcpus.is_change(desired, 4)
