"""Sizes of a booted VM: what the machine is asked for, what the config says then, what is refused."""

from __future__ import annotations

import pytest

from cloudvmm import api
from cloudvmm.config.cpu import CpusConfig
from cloudvmm.config.device import BalloonConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import HotplugMethod, MemoryConfig, MemoryZoneConfig
from cloudvmm.config.number import MIB
from cloudvmm.engine.base import EngineError, RemovalPending
from cloudvmm.engine.fake import Fail
from support.deadline import HOST_S
from support.wait import wait_until

GIB = 1024 * MIB
RESIZE = "The VM could not be resized"
ZONE = "The memory zone could not be resized"
DISK = "The disk could not be resized"
CPU = "Error from CPU manager"
MEMORY = "Memory manager error"
MANAGER = "Error from device manager"


@pytest.fixture
def vm_config(vm_config):
    vm_config.cpus = CpusConfig(boot_vcpus=2, max_vcpus=4)
    vm_config.memory = MemoryConfig(size=GIB, hotplug_size=GIB)
    return vm_config


@pytest.fixture
def boot(caller, vm_config):
    """Boot `vm_config` as the test has changed it."""

    def boot():
        caller(api.vm_create, vm_config)
        caller(api.vm_boot)
        return caller

    return boot


def resize(caller, **sizes):
    caller(api.vm_resize, api.VmResizeData(**sizes))


def refusal(caller, **sizes):
    return caller.refusal(api.vm_resize, api.VmResizeData(**sizes))


def zone_data(zone_id, desired_ram):
    return api.VmResizeZoneData(id=zone_id, desired_ram=desired_ram)


def wait_info(caller, condition):
    return wait_until(lambda: condition(caller(api.vm_info)), "the guest follows", timeout_s=HOST_S)


# vCPUs


def test_more_vcpus_are_in_the_config(booted):
    resize(booted, desired_vcpus=4)

    assert booted(api.vm_info).config.cpus.boot_vcpus == 4
    assert booted.names()[-2:] == ["vm/resizing", "vm/resized"]


def test_fewer_vcpus_are_in_the_config_at_once_and_then_any_number_can_be(booted):
    resize(booted, desired_vcpus=1)
    assert booted(api.vm_info).config.cpus.boot_vcpus == 1

    resize(booted, desired_vcpus=3)

    assert booted(api.vm_info).config.cpus.boot_vcpus == 3


def test_while_a_removal_is_pending_other_numbers_are_refused(booted, engine):
    engine.last_machine.guest.refuse("vcpus")
    resize(booted, desired_vcpus=1)

    assert refusal(booted, desired_vcpus=3) == [RESIZE, CPU, "Still pending removed vCPU"]
    assert refusal(booted, desired_vcpus=1) == [RESIZE, CPU, "Still pending removed vCPU"]
    resize(booted, desired_vcpus=2)  # as many as are there still
    assert booted(api.vm_info).config.cpus.boot_vcpus == 2
    assert booted.names()[-3:] == ["vm/resizing", "vm/resizing", "vm/resized"]

    engine.last_machine.guest.obey("vcpus")
    wait_until(lambda: _resizes(booted, 3), "the guest lets go", timeout_s=HOST_S)


def _resizes(caller, vcpus):
    try:
        resize(caller, desired_vcpus=vcpus)
    except api.ApiError:
        return False
    return True


def test_engine_that_still_waits_for_the_guest_is_pending_too(booted, engine):
    engine.faults.set("resize_vcpus", Fail(RemovalPending, "2 still to go"), times=1)

    # The same error, and code, as where control knows it by itself.
    assert refusal(booted, desired_vcpus=3) == [RESIZE, CPU, "Still pending removed vCPU"]


@pytest.mark.parametrize(
    ("vcpus", "text"), [(0, "Requested zero vCPUs"), (5, "Requested vCPUs exceed maximum")]
)
def test_numbers_of_vcpus_that_cannot_be(booted, vcpus, text):
    assert refusal(booted, desired_vcpus=vcpus) == [RESIZE, CPU, text]
    assert booted(api.vm_info).config.cpus.boot_vcpus == 2
    assert booted.names()[-1] == "vm/resizing"


def test_failure_to_remove_vcpus_leaves_nothing_pending(booted, engine):
    engine.faults.set("resize_vcpus", Fail(EngineError, "no"), times=1)

    assert refusal(booted, desired_vcpus=1) == [RESIZE, CPU, "no"]
    resize(booted, desired_vcpus=3)


# RAM by ACPI


def test_more_ram_is_in_the_config_and_the_actual_size(booted):
    resize(booted, desired_ram=GIB + 256 * MIB)

    info = booted(api.vm_info)
    assert (info.config.memory.size, info.memory_actual_size) == (GIB + 256 * MIB, GIB + 256 * MIB)


def test_less_ram_is_for_the_next_boot(booted, engine):
    resize(booted, desired_ram=GIB // 2)
    resize(booted, desired_ram=GIB)
    engine.faults.set("add_memory", Fail(EngineError, "no module was needed"))

    resize(booted, desired_ram=GIB // 2)

    assert booted(api.vm_info).config.memory.size == GIB // 2


def test_eight_modules_and_no_more(booted):
    for number in range(1, 9):
        resize(booted, desired_ram=GIB + number * 128 * MIB)

    assert refusal(booted, desired_ram=3 * GIB) == [RESIZE, MEMORY, "No ACPI slot available"]


@pytest.mark.parametrize(
    ("ram_bytes", "text"),
    [
        (GIB + MIB, "The requested hotplug memory addition is not a valid size"),
        (3 * GIB, "Not enough space in the hotplug RAM region"),
    ],
)
def test_sizes_of_ram_that_cannot_be(booted, ram_bytes, text):
    assert refusal(booted, desired_ram=ram_bytes) == [RESIZE, MEMORY, text]
    assert booted(api.vm_info).config.memory.size == GIB


def test_engine_without_the_module_is_the_memory_managers_failure(booted, engine):
    engine.faults.set("add_memory", Fail(EngineError, "no"), times=1)

    assert refusal(booted, desired_ram=GIB + 128 * MIB) == [RESIZE, MEMORY, "no"]
    resize(booted, desired_ram=GIB + 128 * MIB)


def test_ram_in_zones_is_not_resized_as_a_whole(boot, vm_config):
    vm_config.memory = MemoryConfig(size=0, zones=[MemoryZoneConfig(id="a", size=GIB)])

    assert refusal(boot(), desired_ram=2 * GIB)[1:] == [
        MEMORY,
        "Impossible to resize guest memory if it is backed by user defined memory regions",
    ]


# RAM by virtio-mem


@pytest.fixture
def virtio_mem(vm_config):
    vm_config.memory.hotplug_method = HotplugMethod.VIRTIO_MEM
    return vm_config


def test_virtio_mem_is_asked_for_what_is_above_boot_ram(virtio_mem, boot):
    caller = boot()

    resize(caller, desired_ram=GIB + 2 * MIB)

    info = wait_info(caller, lambda info: info.memory_actual_size == GIB + 2 * MIB and info)
    assert (info.config.memory.size, info.config.memory.hotplugged_size) == (GIB, 2 * MIB)
    resize(caller, desired_ram=GIB)
    info = wait_info(caller, lambda info: info.memory_actual_size == GIB and info)
    assert info.config.memory.hotplugged_size is None


def test_actual_size_follows_the_guest_not_the_request(virtio_mem, boot, engine):
    caller = boot()
    engine.last_machine.guest.refuse("zone")

    resize(caller, desired_ram=GIB + 2 * MIB)

    info = caller(api.vm_info)
    assert (info.config.memory.hotplugged_size, info.memory_actual_size) == (2 * MIB, GIB)


@pytest.mark.parametrize(
    ("ram_bytes", "texts"),
    [
        (GIB - 1, ["Invalid resize request: desired_size = 1073741823 below boot size = 1073741824"]),
        (
            GIB,
            [
                "Failed to virtio-mem resize",
                "Resize invalid argument",
                "Failed to update virtio configuration:"
                " ResizeError(new size 0x0 and requested_size are identical)",
            ],
        ),
    ],
)
def test_sizes_that_virtio_mem_cannot_have(virtio_mem, boot, ram_bytes, texts):
    assert refusal(boot(), desired_ram=ram_bytes) == [RESIZE, MEMORY, *texts]


def test_virtio_mem_without_hotplug_size_has_no_handler(virtio_mem, boot):
    virtio_mem.memory.hotplug_size = None

    assert refusal(boot(), desired_ram=2 * GIB)[1:] == [MEMORY, "No virtio-mem resizing handler found"]


# The balloon


def test_balloon_takes_its_size_from_the_guest(boot, vm_config):
    vm_config.balloon = BalloonConfig(size=256 * MIB)
    caller = boot()
    wait_info(caller, lambda info: info.memory_actual_size == GIB - 256 * MIB)

    resize(caller, desired_balloon=128 * MIB)

    wait_info(caller, lambda info: info.memory_actual_size == GIB - 128 * MIB)
    assert caller(api.vm_info).config.balloon.size == 128 * MIB


def test_balloon_may_be_larger_than_ram(boot, vm_config):
    vm_config.balloon = BalloonConfig(size=0)
    caller = boot()

    resize(caller, desired_balloon=8 * GIB)

    wait_info(caller, lambda info: info.memory_actual_size == 0)


def test_balloon_that_is_not_there_is_missing(booted):
    assert refusal(booted, desired_balloon=0) == [
        RESIZE,
        MANAGER,
        "Missing virtio-balloon, can't proceed as expected",
    ]


def test_engine_without_the_balloon_fails_the_resize(boot, vm_config, engine):
    vm_config.balloon = BalloonConfig(size=0)
    caller = boot()
    engine.faults.set("resize_balloon", Fail(EngineError, "no"))

    assert refusal(caller, desired_balloon=1)[1:] == [MANAGER, "Failed to resize virtio-balloon", "no"]


# The parts together


def test_first_failure_stops_and_what_was_done_stays(booted):
    chain = refusal(booted, desired_vcpus=3, desired_ram=GIB + 1, desired_balloon=5)

    assert chain[1] == MEMORY
    config = booted(api.vm_info).config
    assert (config.cpus.boot_vcpus, config.memory.size) == (3, GIB)
    assert booted.names()[-1] == "vm/resizing"


def test_resize_of_nothing_tells_that_it_happened(booted):
    resize(booted)

    assert booted.names()[-2:] == ["vm/resizing", "vm/resized"]


def test_resized_vm_reboots_with_its_new_sizes(booted):
    resize(booted, desired_vcpus=4, desired_ram=GIB + 128 * MIB)

    booted(api.vm_reboot)

    config = booted(api.vm_info).config
    assert (config.cpus.boot_vcpus, config.memory.size) == (4, GIB + 128 * MIB)
    resize(booted, desired_vcpus=1)
    resize(booted, desired_ram=2 * GIB + 128 * MIB)


def test_resize_of_a_paused_vm(booted):
    booted(api.vm_pause)
    resize(booted, desired_vcpus=1)
    assert refusal(booted, desired_vcpus=3)[-1] == "Still pending removed vCPU"

    booted(api.vm_resume)

    wait_until(lambda: _resizes(booted, 3), "the guest lets go", timeout_s=HOST_S)


# Zones


@pytest.fixture
def zones(virtio_mem):
    virtio_mem.memory = MemoryConfig(
        size=0,
        hotplug_method=HotplugMethod.VIRTIO_MEM,
        zones=[
            MemoryZoneConfig(id="fixed", size=GIB),
            MemoryZoneConfig(id="big", size=GIB, hotplug_size=GIB),
        ],
    )
    return virtio_mem


def test_zone_grows_and_shrinks_to_its_boot_size(zones, boot):
    caller = boot()

    caller(api.vm_resize_zone, zone_data("big", GIB + 4 * MIB))
    info = wait_info(caller, lambda info: info.memory_actual_size == 2 * GIB + 4 * MIB and info)
    assert (info.config.memory.zones[1].size, info.config.memory.zones[1].hotplugged_size) == (GIB, 4 * MIB)

    caller(api.vm_resize_zone, zone_data("big", GIB))
    assert caller(api.vm_info).config.memory.zones[1].hotplugged_size == 0
    assert "vm/resizing" not in caller.names()


@pytest.mark.parametrize(
    ("zone_id", "ram_bytes", "texts"),
    [
        ("none", 2 * GIB, ["Failed resizing a memory zone"]),
        ("fixed", 2 * GIB, [MEMORY, "No virtio-mem resizing handler found"]),
        (
            "big",
            GIB - MIB,
            [MEMORY, "Invalid resize request: desired_size = 1072693248 below boot size = 1073741824"],
        ),
        (
            "big",
            3 * GIB,
            [
                MEMORY,
                "Failed to virtio-mem resize",
                "Resize invalid argument",
                "Failed to update virtio configuration:"
                " ResizeError(new size 0x80000000 is bigger than region_size 0x40000000)",
            ],
        ),
    ],
)
def test_sizes_that_a_zone_cannot_have(zones, boot, zone_id, ram_bytes, texts):
    caller = boot()
    before = caller(api.vm_info).config

    assert caller.refusal(api.vm_resize_zone, zone_data(zone_id, ram_bytes)) == [ZONE, *texts]
    assert caller(api.vm_info).config == before


def test_zone_of_a_vm_without_zones_is_unknown(booted):
    assert booted.refusal(api.vm_resize_zone, zone_data("mem0", 2 * GIB)) == [
        ZONE,
        "Failed resizing a memory zone",
    ]


def test_engine_that_fails_a_zone_changes_nothing(zones, boot, engine):
    caller = boot()
    engine.faults.set("request_zone_size", Fail(EngineError, "no"), times=1)

    assert caller.refusal(api.vm_resize_zone, zone_data("big", GIB + 2 * MIB))[1:] == [
        MEMORY,
        "Failed to virtio-mem resize",
        "no",
    ]
    caller(api.vm_resize_zone, zone_data("big", GIB + 2 * MIB))


# Disks


@pytest.fixture
def image(vm_config, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(1024))
    vm_config.disks = [DiskConfig(path=str(path)), DiskConfig(id="v", vhost_user=True, vhost_socket="/s")]
    vm_config.memory.shared = True
    return path


def disk_data(disk_id, size):
    return api.VmResizeDiskData(id=disk_id, desired_size=size)


def test_resized_disk_has_its_size_and_the_config_stays(image, boot):
    caller = boot()
    before = caller.settled_info()

    caller(api.vm_resize_disk, disk_data("_disk0", 4096))

    assert image.stat().st_size == 4096
    assert caller(api.vm_info) == before


@pytest.mark.parametrize(
    ("disk_id", "size", "texts"),
    [
        ("none", 512, ["Failed to find device corresponding to the given identifier: none"]),
        ("v", 512, ["Failed to find device corresponding to the given identifier: v"]),
        ("__rng", 512, ["Failed to find device corresponding to the given identifier: __rng"]),
        ("_disk0", 513, ["Disk resize error", "Disk image size is not a multiple of 512"]),
    ],
)
def test_disks_and_sizes_that_cannot_be(image, boot, disk_id, size, texts):
    assert boot().refusal(api.vm_resize_disk, disk_data(disk_id, size)) == [DISK, MANAGER, *texts]
    assert image.stat().st_size == 1024


def test_removed_disk_is_unknown_while_the_guest_has_it(image, boot, engine):
    caller = boot()
    engine.last_machine.guest.refuse("device")
    caller(api.vm_remove_device, api.VmRemoveDeviceData(id="_disk0"))

    assert caller.refusal(api.vm_resize_disk, disk_data("_disk0", 4096))[-1].endswith("identifier: _disk0")


def test_engine_that_fails_a_disk_is_named(image, boot, engine):
    caller = boot()
    engine.faults.set("resize_disk", Fail(EngineError, "no"))

    assert caller.refusal(api.vm_resize_disk, disk_data("_disk0", 4096))[2:] == ["Disk resize error", "no"]


def test_cold_resize_of_a_disk_is_refused(caller, vm_config):
    caller(api.vm_create, vm_config)

    assert caller.refusal(api.vm_resize_disk, disk_data("d", 512)) == [DISK, "Failed resizing a disk image"]
