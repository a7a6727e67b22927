"""Devices that come and go: the steps of `vm.add-*` and `vm.remove-device`.

Reference: lifecycle.md section 9.
"""

from __future__ import annotations

from functools import partial

from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty, VmActionPayload
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.control import edit
from cloudvmm.control.descriptor import close_descriptors, descriptors_of
from cloudvmm.control.holding import Holding
from cloudvmm.control.worker import Steps


class Hotplug:
    """`holding` is the state that the steps work on."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding

    def add_device(self, device: PciDevice) -> Steps:
        # A rule that is broken wins over means that are missing.
        changed: VmConfig = yield partial(edit.with_device, self._holding.created_config(), device)
        if self._holding.vm is not None:
            raise api_error.DeviceManager from api_error.NotImplementedYet(
                "Adding a device to a booted VM comes with a later release; add it before vm.boot"
            )
        self._holding.vm_config = changed
        return VmActionPayload()

    def remove_device(self, device_id: str) -> Steps:
        vm_config = self._holding.created_config()
        if self._holding.vm is not None:
            if device_id not in self._holding.vm.tree:
                raise api_error.DeviceManager from api_error.UnknownDeviceId(device_id)
            raise api_error.DeviceManager from api_error.NotImplementedYet(
                "Removing a device from a booted VM comes with a later release; remove it before vm.boot"
            )
        changed, removed = yield partial(edit.without_device, vm_config, device_id)
        self._holding.vm_config = changed
        close_descriptors(descriptors_of(removed))
        return Empty()
