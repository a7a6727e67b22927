"""Ids, slots and MACs, as lifecycle.md section 7 hands them out."""

from __future__ import annotations

import pytest

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, DebugConsoleConfig, SerialConfig
from cloudvmm.config.device import PvmemcontrolConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.error import AllocatePciDeviceId, ReservePciDeviceId
from cloudvmm.control.numbering import number_devices
from cloudvmm.control.tree import bdf_of, device_tree
from cloudvmm.errors import error_chain


def test_one_counter_numbers_all_kinds():
    vm_config = VmConfig(disks=[DiskConfig(), DiskConfig()], net=[NetConfig()])

    numbering = number_devices(vm_config, set(), 2, 31)

    assert [disk.id for disk in vm_config.disks] == ["_disk0", "_disk1"]
    assert vm_config.net[0].id == "_net2"
    assert numbering.counter == 3


def test_a_given_id_takes_no_number_and_a_used_name_is_skipped():
    vm_config = VmConfig(disks=[DiskConfig(id="_disk0"), DiskConfig(), DiskConfig(id="mine")])

    number_devices(vm_config, {"_disk0", "mine"}, 2, 31)

    assert [disk.id for disk in vm_config.disks] == ["_disk0", "_disk1", "mine"]


def test_slots_are_lowest_first_in_creation_order():
    vm_config = VmConfig(disks=[DiskConfig()], net=[NetConfig()], watchdog=True)

    numbering = number_devices(vm_config, set(), 2, 31)

    assert numbering.slots == {"__console": 2, "_disk0": 3, "_net1": 4, "__rng": 5, "__watchdog": 6}


def test_a_slot_asked_for_is_reserved_before_others_are_handed_out():
    vm_config = VmConfig(
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
        disks=[DiskConfig(), DiskConfig(pci_device_id=2)],
    )

    numbering = number_devices(vm_config, set(), 2, 31)

    assert numbering.slots == {"_disk0": 3, "_disk1": 2, "__rng": 4}


@pytest.mark.parametrize("slot", [1, 2])
def test_a_slot_that_is_taken_is_refused(slot):
    vm_config = VmConfig(disks=[DiskConfig(pci_device_id=2), DiskConfig(pci_device_id=slot)])

    with pytest.raises(ReservePciDeviceId) as caught:
        number_devices(vm_config, set(), 2, 31)

    assert error_chain(caught.value) == [
        "Could not reserve the PCI device ID",
        f"Valid PCI device identifier but already used: {slot}",
    ]


def test_devices_beyond_the_slots_share_those_of_devices_that_are_never_removed():
    vm_config = VmConfig(disks=[DiskConfig() for _ in range(40)], watchdog=True)

    numbering = number_devices(vm_config, set(), 2, 31)

    slots = numbering.slots
    assert len(set(slots.values())) == len(slots) == 43
    assert [slots["__console"], slots["_disk0"], slots["_disk28"]] == [2, 3, 31]
    assert [slots[f"_disk{number}"] for number in range(29, 36)] == [2 + 32 * each for each in range(1, 8)]
    assert slots["_disk36"] == 3 + 32  # the console's slot is full
    shared = ["__console", "_disk0", *(f"_disk{number}" for number in range(29, 40)), "__rng", "__watchdog"]
    assert [name for name in slots if numbering.shares_slot(name)] == shared
    assert [bdf_of(slots[name]) for name in ("_disk28", "_disk35")] == ["0000:00:1f.0", "0000:00:02.7"]


def test_a_slot_that_is_shared_is_not_free_while_one_of_its_devices_is_there():
    vm_config = VmConfig(disks=[DiskConfig() for _ in range(30)])
    numbering = number_devices(vm_config, set(), 2, 31)

    numbering.release("__console")

    with pytest.raises(AllocatePciDeviceId):
        numbering.find_slot("new", None)
    assert numbering.find_slot("new", numbering.release("_disk0")) == 3


def test_slot_that_is_to_be_given_out_last_is():
    numbering = number_devices(VmConfig(), set(), 2, 6)
    free = sorted(set(range(2, 7)) - set(numbering.slots.values()))

    assert numbering.find_slot("new", None, last=free[:1]) == free[1]
    assert numbering.find_slot("new", None, last=free) == free[0]
    assert numbering.find_slot("new", free[0], last=free) == free[0]


def test_more_devices_than_functions_are_refused():
    vm_config = VmConfig(disks=[DiskConfig() for _ in range(239)])

    with pytest.raises(AllocatePciDeviceId) as caught:
        number_devices(vm_config, set(), 2, 31)

    assert error_chain(caught.value) == [
        "Failed to find an available PCI device ID",
        "Could not find an available device slot on the PCI bus",
    ]


def test_a_missing_mac_is_generated_and_a_given_one_kept():
    vm_config = VmConfig(net=[NetConfig(), NetConfig(mac="12:34:56:78:90:ab")])

    number_devices(vm_config, set(), 2, 31)

    assert vm_config.net[0].mac.startswith("2e:")
    assert len(vm_config.net[0].mac) == 17
    assert vm_config.net[1].mac == "12:34:56:78:90:ab"


def test_only_devices_of_the_lists_get_their_id_written():
    vm_config = VmConfig(pvpanic=True, watchdog=True)

    numbering = number_devices(vm_config, set(), 2, 31)

    assert vm_config.rng.id is None
    assert numbering.virtio == ["__console", "__rng"]
    assert list(numbering.slots) == ["__console", "__rng", "__watchdog", "__pvpanic"]


def test_nodes_of_the_board_are_the_references():
    vm_config = VmConfig(
        pvmemcontrol=PvmemcontrolConfig(),
        pvpanic=True,
        serial=SerialConfig(mode=ConsoleOutputMode.NULL),
        debug_console=DebugConsoleConfig(mode=ConsoleOutputMode.NULL),
    )
    numbering = number_devices(vm_config, set(), 1, 31)

    tree = device_tree(vm_config, numbering, {})

    legacy = [name for name, node in tree.items() if node.pci_bdf is None and node.parent is None]
    assert legacy == ["__ioapic", "__serial"]  # where nothing takes its bytes, there is no debug console
    assert tree["__pvmemcontrol"].pci_bdf == "0000:00:03.0"
    assert tree["__pvpanic"].pci_bdf == "0000:00:04.0"
    assert tree["__pvmemcontrol"].children == []
