"""Sizes that change: the steps of `vm.resize`, `vm.resize-zone` and `vm.resize-disk`.

What may be asked for is arithmetic (`ram.py`); here it is asked for, and the config follows. A resize has up
to three parts; the first that fails ends it, and what was done before stays done.
Reference: lifecycle.md section 10.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty
from cloudvmm.config.memory import DEFAULT_ZONE_ID, HotplugMethod
from cloudvmm.config.operation import VmResizeData, VmResizeDiskData, VmResizeZoneData
from cloudvmm.control import edit
from cloudvmm.control.error import (
    DeviceRefused,
    DiskResize,
    DiskSizeNotAligned,
    MissingVirtioBalloon,
    RamRefused,
    VcpusRefused,
    VirtioBalloonResize,
    VirtioMemResizeFail,
)
from cloudvmm.control.holding import Holding
from cloudvmm.control.progress import BALLOON, RAM, VCPUS, Properties
from cloudvmm.control.ram import Vcpus, check_above_boot
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Steps
from cloudvmm.engine.base import EngineError, RemovalPending
from cloudvmm.events.hub import EventHub

SECTOR_BYTES: Final = 512


class Resize:
    """`holding` is the state that the steps work on."""

    def __init__(self, events: EventHub, holding: Holding) -> None:
        self._events = events
        self._holding = holding

    def resize(self, sizes: VmResizeData) -> Steps:
        vm_config, vm = self._holding.created_config(), self._holding.vm
        if vm is None:
            self._holding.vm_config = yield partial(edit.with_sizes, vm_config, sizes)
            return Empty()
        self._events.emit("vm", "resizing")
        if sizes.desired_vcpus is not None:
            yield from self._resize_vcpus(vm, sizes.desired_vcpus)
        if sizes.desired_ram is not None:
            yield from self._resize_ram(vm, sizes.desired_ram)
        if sizes.desired_balloon is not None:
            yield from self._resize_balloon(vm, sizes.desired_balloon)
        self._events.emit("vm", "resized")
        return Empty()

    def resize_zone(self, wanted: VmResizeZoneData) -> Steps:
        vm_config, vm = self._holding.created_config(), self._holding.vm
        if vm is None:
            self._holding.vm_config = yield partial(edit.with_zone_size, vm_config, wanted)
            return Empty()
        zone = next((zone for zone in vm_config.memory.zones or () if zone.id == wanted.id), None)
        if zone is None:
            raise api_error.ResizeZone
        plugged_bytes = wanted.desired_ram - zone.size
        try:
            check_above_boot(wanted.desired_ram, zone.size)
            yield from self._request_zone(vm, zone.id, plugged_bytes)
        except RamRefused as error:
            raise api_error.MemoryManager from error
        self._holding.vm_config = edit.with_zone_plugged(vm_config, zone.id, plugged_bytes)
        part, actual_bytes = vm.sized_by_zone(zone.id)
        self._tell(vm.progress.ask(part, wanted.desired_ram, actual_bytes))
        return Empty()

    def resize_disk(self, wanted: VmResizeDiskData) -> Steps:
        vm_config, vm = self._holding.created_config(), self._holding.vm
        if vm is None:
            raise api_error.ResizeDisk
        if not any(disk.id == wanted.id and not disk.vhost_user for disk in vm_config.disks or ()):
            raise api_error.DeviceManager from api_error.UnknownDeviceId(wanted.id)
        try:
            if wanted.desired_size % SECTOR_BYTES:
                raise DiskSizeNotAligned
            yield partial(vm.machine.resize_disk, wanted.id, wanted.desired_size)
        except (DiskSizeNotAligned, EngineError) as error:
            raise api_error.DeviceManager from _caused(DiskResize(), error)
        return Empty()

    def _resize_vcpus(self, vm: Vm, desired: int) -> Steps:
        vm_config, before = self._holding.created_config(), vm.vcpus
        try:
            if before.is_change(desired, vm_config.cpus.max_vcpus):
                # The guest may let go of some, and the loop hear of it, before the engine has returned.
                if desired < before.present:
                    vm.vcpus = Vcpus(before.present, is_removing=True)
                yield partial(vm.machine.resize_vcpus, desired)
                if desired > before.present:
                    vm.vcpus = Vcpus(desired)
        except RemovalPending:
            # Whoever notices first, the engine or this VMM: to a client it is one error.
            vm.vcpus = Vcpus(before.present, is_removing=True)
            raise api_error.CpuManager from api_error.VcpuRemovalPending()
        except EngineError as error:
            if vm.vcpus.is_removing:  # else the guest has let go of them all the same
                vm.vcpus = before
            raise api_error.CpuManager from error
        except (VcpusRefused, api_error.VcpuRemovalPending) as error:
            raise api_error.CpuManager from error
        self._holding.vm_config = edit.with_vcpus(vm_config, desired)
        self._tell(vm.progress.ask(VCPUS, desired, vm.guest_vcpus))
        return Empty()

    def _resize_ram(self, vm: Vm, desired_bytes: int) -> Steps:
        vm_config = self._holding.created_config()
        try:
            vm.ram.check_resizable()
            if vm_config.memory.hotplug_method is HotplugMethod.ACPI:
                yield from self._plug_module(vm, desired_bytes)
            else:
                check_above_boot(desired_bytes, vm.ram.boot_bytes)
                yield from self._request_zone(vm, DEFAULT_ZONE_ID, desired_bytes - vm.ram.boot_bytes)
        except (RamRefused, EngineError) as error:
            raise api_error.MemoryManager from error
        self._holding.vm_config = edit.with_ram(vm_config, desired_bytes)
        is_for_reboot = desired_bytes < vm.ram.current_bytes
        self._tell(vm.progress.ask(RAM, desired_bytes, vm.guest_ram_bytes, is_for_reboot=is_for_reboot))
        return Empty()

    def _plug_module(self, vm: Vm, desired_bytes: int) -> Steps:
        added_bytes = vm.ram.module_bytes(desired_bytes)
        if added_bytes:
            yield partial(vm.machine.add_memory, added_bytes)
            vm.ram = vm.ram.with_module(added_bytes)
        return Empty()

    def _request_zone(self, vm: Vm, zone_id: str, requested_bytes: int) -> Steps:
        vm.ram.check_zone(zone_id, requested_bytes)
        try:
            yield partial(vm.machine.request_zone_size, zone_id, requested_bytes)
        except EngineError as error:
            raise VirtioMemResizeFail from error
        vm.ram = vm.ram.with_zone(zone_id, requested_bytes)
        return Empty()

    def _resize_balloon(self, vm: Vm, balloon_bytes: int) -> Steps:
        vm_config = self._holding.created_config()
        if vm_config.balloon is None:
            raise api_error.DeviceManager from MissingVirtioBalloon()
        try:
            yield partial(vm.machine.resize_balloon, balloon_bytes)
        except EngineError as error:
            raise api_error.DeviceManager from _caused(VirtioBalloonResize(), error)
        self._holding.vm_config = edit.with_balloon(vm_config, vm_config.balloon, balloon_bytes)
        self._tell(vm.progress.ask(BALLOON, balloon_bytes, vm.guest_ram.balloon_bytes))
        return Empty()

    def _tell(self, properties: Properties) -> None:
        self._events.emit("vm", "resize-progress", properties, is_ours=True)


def _caused(error: DeviceRefused | api_error.VmError, cause: Exception) -> api_error.VmError:
    error.__cause__ = cause
    return error
