"""The record of a VM: its form is on disk and on the wire, so it changes with a number only."""

from __future__ import annotations

import msgspec
import pytest

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import HotplugMethod
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.error import BadRecord
from cloudvmm.control.numbering import number_devices
from cloudvmm.control.ram import GuestRam, Vcpus
from cloudvmm.control.record import decode_record, encode_record
from cloudvmm.control.vm import Vm
from cloudvmm.engine.fake import FakeEngine

GOLDEN = {
    "slots": {"__console": 1, "mine": 5, "_disk0": 2, "__rng": 3, "mem0": 4},
    "virtio": ["__console", "mine", "_disk0", "__rng", "mem0"],
    "kinds": {"__console": "console", "mine": "block", "_disk0": "block", "__rng": "rng", "mem0": "mem"},
    "trapped": [],
    "given_ids": ["mine"],
    "counter": 1,
    "vcpus": {"present": 3, "is_removing": True},
    "ram": {
        "boot_bytes": 536870912,
        "modules": [134217728],
        "room_bytes": 1073741824,
        "has_user_zones": False,
        "zones": {"mem0": {"hotplug_bytes": 1073741824, "requested_bytes": 0}},
    },
    "guest_ram": {"balloon_bytes": 7, "plugged": {"mem0": 2097152}},
}


@pytest.fixture
def vm() -> Vm:
    vm_config = VmConfig(disks=[DiskConfig(id="mine", path="/a", pci_device_id=5), DiskConfig(path="/b")])
    vm_config.memory.hotplug_method = HotplugMethod.VIRTIO_MEM
    vm_config.memory.hotplug_size = 1 << 30
    numbering = number_devices(vm_config, {"mine"}, 1, 31)
    vm = Vm(None, numbering, vm_config)  # nobody asks its machine for anything
    vm.vcpus = Vcpus(3, is_removing=True)
    vm.ram = vm.ram.with_module(128 << 20)
    vm.guest_ram = GuestRam(7, {"mem0": 2 << 20})
    return vm


def test_form_is_the_golden_one(vm):
    assert msgspec.json.decode(encode_record(vm)) == GOLDEN


def test_record_gives_back_what_it_was_made_of(vm):
    record = decode_record(encode_record(vm))

    assert record.numbering(FakeEngine().info) == vm.numbering
    assert (record.vcpus, record.ram, record.guest_ram) == (vm.vcpus, vm.ram, vm.guest_ram)


@pytest.mark.parametrize("missing", sorted(GOLDEN))
def test_record_that_lacks_a_member_is_refused(missing):
    rest = {name: value for name, value in GOLDEN.items() if name != missing}
    with pytest.raises(BadRecord):
        decode_record(msgspec.Raw(msgspec.json.encode(rest)))


@pytest.mark.parametrize(
    "change",
    [
        {"counter": -1},
        {"counter": 10**30},
        {"vcpus": {"present": 0}},
        {"vcpus": {"present": -1}},
        {"ram": GOLDEN["ram"] | {"modules": [-1]}},
        {"ram": GOLDEN["ram"] | {"modules": [1] * 9}},
        {"ram": GOLDEN["ram"] | {"zones": {"mem0": {"hotplug_bytes": -1, "requested_bytes": 0}}}},
        {"guest_ram": {"plugged": {"mem0": 10**30}}},
        {"guest_ram": {"balloon_bytes": -1}},
    ],
)
def test_record_with_a_number_that_cannot_be_is_refused(change):
    with pytest.raises(BadRecord):
        decode_record(msgspec.Raw(msgspec.json.encode(GOLDEN | change)))
