"""Devices that come and go: the steps of `vm.add-*` and `vm.remove-device`.

A device that is added is in the config, the tree and its slot once the engine has it, or nowhere. One that is
removed leaves the config at once, and tree and slot when the guest lets go of it, which the loop hears.
Reference: lifecycle.md section 9.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty, PciDeviceInfo, VmActionPayload
from cloudvmm.config.device import UserDeviceConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn
from cloudvmm.control import edit
from cloudvmm.control.blueprint import write_image_type
from cloudvmm.control.condition import check_device
from cloudvmm.control.descriptor import close_descriptors, descriptors_of
from cloudvmm.control.error import (
    DeviceRefused,
    IdInDeviceTree,
    InvalidIommuHotplug,
    InvalidIommuRemove,
    MissingNode,
    RemovalNotAllowed,
    SharedSlot,
    UserDeviceSocketInUse,
)
from cloudvmm.control.holding import Holding, Intent
from cloudvmm.control.numbering import PLAIN, REMOVABLE, generate_mac, is_on_iommu_segment
from cloudvmm.control.tree import bdf_of
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Steps
from cloudvmm.engine.base import EngineError, Machine


class Hotplug:
    """`holding` is the state that the steps work on."""

    def __init__(self, holding: Holding, warn: Warn) -> None:
        self._holding = holding
        self._warn = warn

    def add_device(self, device: PciDevice) -> Steps:
        before = self._holding.created_config()
        # A rule that is broken wins over whatever else is wrong.
        changed, device = yield partial(edit.with_device, before, device, self._warn)
        vm = self._holding.vm
        if vm is None:
            self._holding.vm_config = changed
            return VmActionPayload()
        try:
            check_addable(device, before, vm)
            device_id = device.id = vm.numbering.generate_id(device, vm.tree)
            unsettled = vm.machine.unsettled_slots
            slot = vm.numbering.find_slot(device_id, device.pci_device_id, last=unsettled)
            if isinstance(device, NetConfig):
                device.mac = device.mac or generate_mac()
            self._holding.intent = Intent(changed, device_id, slot)
            self._holding.promise()
            yield partial(_plug, vm.machine, device, slot)
        except (DeviceRefused, EngineError) as error:
            raise api_error.DeviceManager from error
        if isinstance(device, DiskConfig):
            write_image_type(device, vm.machine)
        vm.numbering.take(device, device_id, slot)
        vm.renew_tree()
        self._holding.vm_config = changed
        return VmActionPayload(msgspec.json.encode(PciDeviceInfo(id=device_id, bdf=bdf_of(slot))))

    def remove_device(self, device_id: str) -> Steps:
        if self._holding.vm is not None:
            yield from self._unplug(self._holding.vm, device_id)
        else:
            before = self._holding.created_config()
            changed, removed = yield partial(edit.without_device, before, device_id)
            self._drop(changed, removed)
        return Empty()

    def _unplug(self, vm: Vm, named_id: str) -> Steps:
        changed, removed = yield partial(_without_device, self._holding.created_config(), named_id)
        try:
            yield partial(vm.machine.remove_device, find_removable(named_id, vm))
        except (DeviceRefused, api_error.UnknownDeviceId, EngineError) as error:
            raise api_error.DeviceManager from error
        self._drop(changed, removed)
        return Empty()

    def _drop(self, changed: VmConfig, removed: Any) -> None:
        self._holding.vm_config = changed
        close_descriptors(descriptors_of(removed))


def check_addable(device: PciDevice, vm_config: VmConfig, vm: Vm) -> None:
    """Raise what keeps `device` from being added to `vm`, whose config without it is `vm_config`.

    :raises DeviceRefused: its id is in use still, it cannot be behind the vIOMMU, or its socket is taken.
    """
    if device.id is not None and device.id in vm.tree:
        raise IdInDeviceTree(device.id)
    if device.iommu and not is_on_iommu_segment(device, vm_config):
        raise InvalidIommuHotplug
    if isinstance(device, UserDeviceConfig):
        for other in vm_config.user_devices or ():
            if other.socket == device.socket:
                raise UserDeviceSocketInUse(device.socket)


def find_removable(named_id: str, vm: Vm) -> str:
    """Return the id of the device that `named_id` means: its own, or that of its virtio-pci wrapper.

    :raises UnknownDeviceId: nothing in the tree is called so.
    :raises DeviceRefused: it is of a kind, or in a place, that nothing is removed from.
    """
    node = vm.tree.get(named_id)
    if node is None:
        raise api_error.UnknownDeviceId(named_id)
    device_id = node.children[0] if node.children else named_id
    kind = vm.numbering.kinds.get(device_id, PLAIN)
    if kind == PLAIN:
        raise MissingNode
    if device_id in vm.numbering.trapped:
        raise InvalidIommuRemove(bdf_of(vm.numbering.slots[device_id]))
    if kind not in REMOVABLE:
        raise RemovalNotAllowed(kind)
    if vm.numbering.shares_slot(device_id):
        raise SharedSlot(bdf_of(vm.numbering.slots[device_id]))
    return device_id


def _plug(machine: Machine, device: PciDevice, slot: int) -> None:
    check_device(device)
    machine.add_device(device, slot)


def _without_device(vm_config: VmConfig, device_id: str) -> tuple[VmConfig, Any]:
    """Drop the device, if it is there: the guest may still have one that was removed before."""
    try:
        return edit.without_device(vm_config, device_id)
    except api_error.NoDeviceToRemove:
        return vm_config, None
