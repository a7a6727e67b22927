"""Devices added to and removed from a booted VM: what is told, what is kept, what is refused."""

from __future__ import annotations

import os

import msgspec
import pytest

from cloudvmm import api
from cloudvmm.config.device import (
    BalloonConfig,
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    PmemConfig,
    RtcConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import HotplugMethod
from cloudvmm.config.net import NetConfig
from cloudvmm.config.number import MIB
from cloudvmm.config.platform import PlatformConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import EngineError, HelperEnded, ImageLocked, RemovalRefused
from cloudvmm.engine.fake import Fail
from support.wait import wait_until

from .conftest import DEADLINE_S

VFIO_PATH = "/sys/bus/pci/devices/0000:01:00.0"
ADD_DISK = "The disk could not be added to the VM"
REMOVE = "The device could not be removed from the VM"
MANAGER = "Error from device manager"


@pytest.fixture
def image(tmp_path) -> str:
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    return str(path)


@pytest.fixture
def vm_config(vm_config: VmConfig, image: str) -> VmConfig:
    """One disk, `_disk0` in slot 1, and `__rng` in slot 2; RAM is shared, for devices that want that."""
    vm_config.memory.shared = True
    vm_config.disks = [DiskConfig(path=image, readonly=True)]
    return vm_config


@pytest.fixture
def guest(booted, engine):
    return engine.last_machine.guest


def add(caller, function, device):
    return msgspec.json.decode(caller(function, device))


def remove(caller, device_id):
    caller(api.vm_remove_device, api.VmRemoveDeviceData(id=device_id))


def removal_refusal(caller, device_id):
    return caller.refusal(api.vm_remove_device, api.VmRemoveDeviceData(id=device_id))


def removed_events(caller):
    return [event.properties for event in caller.events if event.event == "device-removed"]


# Adding


def test_added_disk_is_in_the_answer_the_config_the_tree_and_the_machine(booted, engine, image):
    assert add(booted, api.vm_add_disk, DiskConfig(path=image)) == {"id": "_disk1", "bdf": "0000:00:03.0"}

    info = booted(api.vm_info)
    disk = info.config.disks[1]
    assert (disk.id, disk.image_type.value) == ("_disk1", "Raw")
    assert info.device_tree["_disk1"].parent == "_virtio-pci-_disk1"
    assert info.device_tree["_virtio-pci-_disk1"].pci_bdf == "0000:00:03.0"
    assert "_disk1" in engine.last_machine.counters()


def test_added_net_gets_a_mac_that_stays(booted):
    add(booted, api.vm_add_net, NetConfig(tap="t"))

    net = booted(api.vm_info).config.net[0]
    assert net.mac.startswith("2e:")
    assert net.id == "_net1"


@pytest.mark.parametrize(
    ("function", "device", "device_id"),
    [
        (api.vm_add_fs, FsConfig(tag="t", socket="/s"), "_fs1"),
        (api.vm_add_vsock, VsockConfig(cid=3, socket="/s"), "_vsock1"),
        (api.vm_add_vdpa, VdpaConfig(path="/dev/vhost-vdpa-0"), "_vdpa1"),
        (api.vm_add_user_device, UserDeviceConfig(socket="/s"), "_vfio_user1"),
        (api.vm_add_device, DeviceConfig(path=VFIO_PATH), "_vfio1"),
        (
            api.vm_add_generic_vhost_user,
            GenericVhostUserConfig(socket="/s", queue_sizes=[64], device_type=26),
            "_generic_vhost_user1",
        ),
    ],
)
def test_every_kind_has_its_name_and_one_counter(booted, function, device, device_id):
    assert add(booted, function, device)["id"] == device_id


def test_pmem_in_a_folder_is_there_from_the_boot_on_and_added(caller, vm_config, tmp_path):
    vm_config.pmem = [PmemConfig(file=str(tmp_path), size=2 * MIB)]
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    added = add(caller, api.vm_add_pmem, PmemConfig(file=str(tmp_path), size=2 * MIB))

    assert [pmem.id for pmem in caller(api.vm_info).config.pmem] == ["_pmem1", added["id"]]


def test_device_is_added_while_paused(booted, image):
    booted(api.vm_pause)

    assert add(booted, api.vm_add_disk, DiskConfig(path=image))["id"] == "_disk1"


def test_given_id_and_slot_are_kept_and_take_no_number(booted, image):
    device = DiskConfig(path=image, id="mine", pci_device_id=9)

    assert add(booted, api.vm_add_disk, device) == {"id": "mine", "bdf": "0000:00:09.0"}
    assert add(booted, api.vm_add_disk, DiskConfig(path=image))["id"] == "_disk1"


def test_slot_where_the_guest_may_eject_what_comes_is_given_out_last(booted, engine, image, monkeypatch):
    monkeypatch.setattr(type(engine.last_machine), "unsettled_slots", frozenset({3}))

    assert add(booted, api.vm_add_disk, DiskConfig(path=image))["bdf"] == "0000:00:04.0"


def test_added_devices_come_back_with_a_reboot(booted, image):
    add(booted, api.vm_add_disk, DiskConfig(path=image))

    booted(api.vm_reboot)

    assert "_disk1" in booted(api.vm_info).device_tree


def test_slot_in_use_is_refused_and_the_number_is_used_up(booted, image):
    assert booted.refusal(api.vm_add_disk, DiskConfig(path=image, pci_device_id=2)) == [
        ADD_DISK,
        MANAGER,
        "Failed to find an available PCI device ID",
        "Valid PCI device identifier but already used: 2",
    ]
    assert len(booted(api.vm_info).config.disks) == 1
    assert add(booted, api.vm_add_disk, DiskConfig(path=image))["id"] == "_disk2"


def test_without_a_free_slot_it_is_refused(caller, vm_config, image):
    vm_config.disks = [DiskConfig(path=image, readonly=True) for _ in range(30)]
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    assert caller.refusal(api.vm_add_disk, DiskConfig(path=image)) == [
        ADD_DISK,
        MANAGER,
        "Failed to find an available PCI device ID",
        "Could not find an available device slot on the PCI bus",
    ]


def test_broken_rule_wins_over_everything(booted, image):
    assert booted.refusal(api.vm_add_disk, DiskConfig(path=image, id="_disk0"))[1:] == [
        "Failed to validate config",
        "Identifier _disk0 is not unique",
    ]


def test_second_vsock_is_refused(booted):
    add(booted, api.vm_add_vsock, VsockConfig(cid=3, socket="/s"))

    assert booted.refusal(api.vm_add_vsock, VsockConfig(cid=4, socket="/t")) == [
        "The vsock device could not be added to the VM",
        "Too many virtio-vsock devices",
    ]


def test_device_that_shares_its_slot_is_not_removed_and_none_is_added(caller, vm_config, image):
    vm_config.disks = [DiskConfig(path=image, readonly=True) for _ in range(32)]
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    before = caller.settled_info()
    assert before.device_tree["_virtio-pci-__rng"].pci_bdf == "0000:00:01.2"

    for name in ("_disk0", "_disk31"):
        bdf = before.device_tree[f"_virtio-pci-{name}"].pci_bdf
        assert removal_refusal(caller, name) == [
            REMOVE,
            MANAGER,
            f"Cannot remove a device that shares its PCI slot with others: bdf={bdf}",
        ]
    assert caller.refusal(api.vm_add_disk, DiskConfig(path=image, readonly=True))[-1] == (
        "Could not find an available device slot on the PCI bus"
    )
    assert caller.settled_info() == before
    remove(caller, "_disk1")
    caller.wait_for_event("vm/device-removed")
    assert add(caller, api.vm_add_disk, DiskConfig(path=image, readonly=True))["bdf"] == "0000:00:02.0"


def test_id_that_is_in_the_tree_only_is_refused(booted, guest, image):
    guest.refuse("device")
    remove(booted, "_disk0")

    assert booted.refusal(api.vm_add_disk, DiskConfig(path=image, id="_disk0")) == [
        ADD_DISK,
        MANAGER,
        "Invalid identifier as it is not unique: _disk0",
    ]
    guest.obey("device")
    booted.wait_for_event("vm/device-removed")
    assert add(booted, api.vm_add_disk, DiskConfig(path=image, id="_disk0"))["bdf"] == "0000:00:01.0"


def test_device_behind_the_viommu_needs_a_segment_for_it(booted, image):
    assert booted.refusal(api.vm_add_disk, DiskConfig(path=image, iommu=True)) == [
        ADD_DISK,
        MANAGER,
        "Cannot hotplug device behind vIOMMU",
    ]


def test_device_behind_the_viommu_is_added_to_a_segment_for_it(caller, vm_config, image):
    vm_config.platform = PlatformConfig(num_pci_segments=2, iommu_segments=[1])
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    assert add(caller, api.vm_add_disk, DiskConfig(path=image, iommu=True, pci_segment=1))["id"] == "_disk1"


def test_socket_of_another_user_device_is_refused(booted):
    add(booted, api.vm_add_user_device, UserDeviceConfig(socket="/s"))

    assert booted.refusal(api.vm_add_user_device, UserDeviceConfig(socket="/s"))[1:] == [
        MANAGER,
        'VFIO-user socket path already in use: "/s"',
    ]


@pytest.mark.parametrize(
    ("device", "texts"),
    [
        (DiskConfig(), ["No disk path was specified when one was expected"]),
        (
            DiskConfig(path="/no/such/image"),
            [
                "Cannot open disk path",
                "I/O error (path=/no/such/image op=open)",
                "No such file or directory (os error 2)",
            ],
        ),
    ],
)
def test_disk_that_cannot_be_had_changes_nothing(booted, device, texts):
    before = booted.settled_info()

    assert booted.refusal(api.vm_add_disk, device) == [ADD_DISK, MANAGER, *texts]
    assert booted(api.vm_info) == before


@pytest.mark.parametrize(
    ("error", "text"),
    [(EngineError, "the bus is gone"), (ImageLocked, "Cannot lock images of all block devices")],
)
def test_engine_that_fails_changes_nothing(booted, engine, image, error, text):
    engine.faults.set("add_device", Fail(error, text))
    before = booted.settled_info()

    assert booted.refusal(api.vm_add_disk, DiskConfig(path=image)) == [ADD_DISK, MANAGER, text]
    assert booted(api.vm_info) == before


def test_descriptors_are_closed_after_a_failure_and_kept_after_a_success(booted, engine):
    reader, writer = os.pipe()
    engine.faults.set("add_device", Fail(EngineError, "no"), times=1)
    booted.refusal(api.vm_add_net, NetConfig(fds=[reader]))
    with pytest.raises(OSError):
        os.fstat(reader)

    add(booted, api.vm_add_net, NetConfig(fds=[writer], id="n"))
    os.fstat(writer)
    remove(booted, "n")
    with pytest.raises(OSError):
        os.fstat(writer)


# Removing


def test_removed_device_leaves_at_once_and_is_reported(booted):
    remove(booted, "_disk0")

    booted.wait_for_event("vm/device-removed")
    info = booted(api.vm_info)
    assert info.config.disks == []
    assert "_disk0" not in info.device_tree
    assert "_virtio-pci-_disk0" not in info.device_tree
    assert removed_events(booted) == [{"id": "_disk0", "bdf": "0000:00:01.0"}]


def test_until_the_guest_lets_go_tree_and_slot_are_taken(booted, guest, image):
    guest.refuse("device")
    remove(booted, "_disk0")
    remove(booted, "_disk0")

    info = booted(api.vm_info)
    assert info.config.disks == []
    assert info.device_tree["_virtio-pci-_disk0"].pci_bdf == "0000:00:01.0"
    assert add(booted, api.vm_add_disk, DiskConfig(path=image))["bdf"] == "0000:00:03.0"
    assert removed_events(booted) == []

    guest.obey("device")
    booted.wait_for_event("vm/device-removed")
    assert add(booted, api.vm_add_disk, DiskConfig(path=image))["bdf"] == "0000:00:01.0"


def test_paused_guest_lets_go_after_resume(booted):
    booted(api.vm_pause)
    remove(booted, "_disk0")
    assert "_disk0" in booted(api.vm_info).device_tree

    booted(api.vm_resume)

    booted.wait_for_event("vm/device-removed")
    assert "_disk0" not in booted(api.vm_info).device_tree


def test_reboot_before_the_guest_lets_go_removes_it(booted, guest):
    guest.refuse("device")
    remove(booted, "_disk0")

    booted(api.vm_reboot)

    assert "_disk0" not in booted(api.vm_info).device_tree


def test_name_of_the_wrapper_is_accepted_and_the_config_keeps_the_device(booted):
    remove(booted, "_virtio-pci-_disk0")

    booted.wait_for_event("vm/device-removed")
    info = booted(api.vm_info)
    assert info.config.disks[0].id == "_disk0"
    assert "_disk0" not in info.device_tree
    assert removed_events(booted) == [{"id": "_disk0", "bdf": "0000:00:01.0"}]


def test_vsock_can_be_removed_and_added_again(booted):
    add(booted, api.vm_add_vsock, VsockConfig(cid=3, socket="/s"))
    remove(booted, "_vsock1")
    booted.wait_for_event("vm/device-removed")

    assert booted(api.vm_info).config.vsock is None
    assert add(booted, api.vm_add_vsock, VsockConfig(cid=3, socket="/s"))["id"] == "_vsock2"


@pytest.mark.parametrize(
    ("device_id", "kind"),
    [
        ("__rng", "rng"),
        ("_virtio-pci-__rng", "rng"),
        ("__balloon", "balloon"),
        ("__rtc", "rtc"),
        ("__watchdog", "watchdog"),
        ("mem0", "mem"),
        ("_generic_vhost_user1", "gpu"),
        ("odd", "UNKNOWN"),
    ],
)
def test_kinds_that_stay_are_named(caller, vm_config, device_id, kind):
    vm_config.balloon = BalloonConfig(size=0)
    vm_config.rtc = RtcConfig()
    vm_config.watchdog = True
    vm_config.memory.hotplug_method = HotplugMethod.VIRTIO_MEM
    vm_config.memory.hotplug_size = 128 * MIB
    vm_config.generic_vhost_user = [
        GenericVhostUserConfig(socket="/s", queue_sizes=[64], device_type=16),
        GenericVhostUserConfig(socket="/t", queue_sizes=[64], device_type=7, id="odd"),
    ]
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    assert removal_refusal(caller, device_id) == [
        REMOVE,
        MANAGER,
        f"Not allowed to remove this type of device from the VM: {kind}",
    ]
    assert device_id in caller(api.vm_info).device_tree


@pytest.mark.parametrize("device_id", ["__ioapic", "__serial", "__pvpanic"])
def test_what_is_no_unpluggable_device_has_no_node_to_remove(caller, vm_config, device_id):
    vm_config.pvpanic = True
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    assert removal_refusal(caller, device_id) == [
        REMOVE,
        MANAGER,
        "Could not find the node in the device tree",
    ]


def test_device_that_booted_behind_the_viommu_stays(caller, vm_config, image):
    vm_config.disks[0].iommu = True
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    assert removal_refusal(caller, "_disk0") == [
        REMOVE,
        MANAGER,
        "Cannot remove device from behind vIOMMU: bdf=0000:00:01.0",
    ]


def test_engine_that_fails_to_remove_changes_nothing(booted, engine):
    engine.faults.set("remove_device", Fail(EngineError, "no"))
    before = booted.settled_info()

    assert removal_refusal(booted, "_disk0") == [REMOVE, MANAGER, "no"]
    assert booted(api.vm_info) == before


def test_device_whose_helper_ended_is_in_the_log_and_among_the_events(booted, engine):
    engine.last_machine._report(HelperEnded("fs0", "virtiofsd exited with status 1: no more"))
    wanted = "warn: The program that serves the device fs0 ended: virtiofsd exited with status 1: no more"
    wait_until(lambda: wanted in booted.logged, wanted, timeout_s=DEADLINE_S)
    assert [event.properties for event in booted.events if event.event == "device-helper-ended"] == [
        {"id": "fs0", "reason": "virtiofsd exited with status 1: no more"}
    ]


def test_guest_that_says_that_it_keeps_a_device_is_in_the_log_and_among_the_events(booted, engine):
    booted(api.vm_pause)
    remove(booted, "_disk0")
    engine.last_machine._report(RemovalRefused("_disk0"))
    engine.last_machine._report(RemovalRefused("long gone"))
    wanted = "warn: The guest does not let go of the device long gone"
    wait_until(lambda: wanted in booted.logged, wanted, timeout_s=DEADLINE_S)
    assert "warn: The guest does not let go of the device _disk0" in booted.logged
    assert [event.properties for event in booted.events if event.event == "device-removal-refused"] == [
        {"id": "_disk0", "bdf": "0000:00:01.0"}
    ]
    assert "_disk0" in booted(api.vm_info).device_tree
