"""What a fake machine is made of, and how that changes: devices, vCPUs, RAM. No threads, no guest, no clock.

The machine calls it with its lock held. Rules about sizes are control's; here is only what no machine can do.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import msgspec

from cloudvmm.config.disk import DiskConfig, ImageType
from cloudvmm.config.memory import HotplugMethod
from cloudvmm.config.pci import PciDevice
from cloudvmm.engine.base import DeviceError, EngineError, EngineInfo, MachineSpec, RemovalPending
from cloudvmm.engine.fake.check import check_device, check_slots
from cloudvmm.engine.fake.counter import BALLOON_ID, balloon_counters, device_counters


class HardwareState(msgspec.Struct, frozen=True, kw_only=True):
    """What of it is not in the config, for a machine that goes on elsewhere. Sizes are bytes."""

    slots: dict[str, int]
    ram_bytes: int
    vcpus: int
    leaving_to: int | None = None
    balloon_bytes: int = 0
    plugged: dict[str, int] = msgspec.field(default_factory=dict)
    plugged_at_ms: dict[str, int] = msgspec.field(default_factory=dict)


class Hardware:
    """`spec`'s config is copied: that of the spec stays control's."""

    def __init__(self, spec: MachineSpec, info: EngineInfo, image_types: dict[str, ImageType]) -> None:
        self.vm_config = vm_config = copy.deepcopy(spec.vm_config)
        self.slots = dict(spec.slots)
        self.image_types = image_types
        self.vcpus = vm_config.cpus.boot_vcpus
        self.leaving_to: int | None = None
        self.modules = len(spec.modules)
        self.balloon_bytes = 0
        self.plugged = dict.fromkeys(_zone_ids(spec), 0)
        self._info = info
        memory = vm_config.memory
        self.ram_bytes = memory.size + sum(zone.size for zone in memory.zones or ())
        lists = (vm_config.disks, vm_config.net)
        self._devices: dict[str, PciDevice] = {
            device.id: device for devices in lists for device in devices or () if device.id is not None
        }
        self._plugged_at_ms: dict[str, int] = {}

    def state(self) -> HardwareState:
        return HardwareState(
            slots=self.slots,
            ram_bytes=self.ram_bytes,
            vcpus=self.vcpus,
            leaving_to=self.leaving_to,
            balloon_bytes=self.balloon_bytes,
            plugged=self.plugged,
            plugged_at_ms=self._plugged_at_ms,
        )

    def become(self, state: HardwareState) -> None:
        """Take the sizes of another machine with the same devices."""
        self.ram_bytes, self.balloon_bytes = state.ram_bytes, state.balloon_bytes
        self.vcpus, self.leaving_to = state.vcpus, state.leaving_to
        self.plugged.update(state.plugged)
        self._plugged_at_ms = dict(state.plugged_at_ms)

    def counters(self, tick_ms: int, *, now_s: int) -> dict[str, dict[str, int]]:
        """Return what each device has counted since it is there, and what the guest says at `now_s`."""
        counters: dict[str, dict[str, int]] = {}
        for device_id, device in self._devices.items():
            found = device_counters(device, tick_ms - self._plugged_at_ms.get(device_id, 0))
            if found is not None:
                counters[device_id] = found
        balloon = self.vm_config.balloon
        if tick_ms and balloon is not None and balloon.statistics:
            counters[balloon.id or BALLOON_ID] = balloon_counters(self.ram_bytes - self.balloon_bytes, now_s)
        return counters

    def plug(self, device: PciDevice, slot: int, *, tick_ms: int) -> None:
        """Take `device` in, or raise and stay as it was.

        :raises SlotError: the slot is taken or no slot.
        :raises DeviceError: it has no id of its own, or its file cannot be had.
        """
        if device.id is None or device.id in self.slots:
            raise DeviceError(f"A device needs an id of its own, not {device.id}")
        check_slots({**self.slots, device.id: slot}, self._info)
        image_type = check_device(device)
        if image_type is not None:
            self.image_types = {**self.image_types, device.id: image_type}
        self.slots = {**self.slots, device.id: slot}
        self._devices[device.id] = copy.deepcopy(device)
        self._plugged_at_ms[device.id] = tick_ms

    def check_known(self, device_id: str) -> None:
        """:raises DeviceError: there is no such device."""
        if device_id not in self.slots:
            raise DeviceError(f"There is no device {device_id}")

    def written_disks(self) -> dict[str, tuple[str, ImageType]]:
        """Return path and type of the image of each disk that the guest can write, by its id."""
        return {
            device_id: (disk.path, self.image_types.get(device_id, ImageType.RAW))
            for device_id, disk in self._devices.items()
            if isinstance(disk, DiskConfig) and disk.path is not None and not disk.readonly
        }

    def stand_on(self, images: Mapping[str, tuple[str, ImageType]]) -> None:
        """Have the disks of these ids go on in the images at those paths, of those types."""
        for device_id, (path, image_type) in images.items():
            disk = self._devices[device_id]
            self._devices[device_id] = msgspec.structs.replace(disk, path=path)
            self.image_types = {**self.image_types, device_id: image_type}

    def unplug(self, device_id: str) -> None:
        self.slots = {known: slot for known, slot in self.slots.items() if known != device_id}
        self.image_types = {known: kind for known, kind in self.image_types.items() if known != device_id}
        self._devices.pop(device_id, None)
        self._plugged_at_ms.pop(device_id, None)

    def want_vcpus(self, vcpus: int) -> None:
        """Add vCPUs at once; note how many are to stay where some are to go.

        :raises RemovalPending: some that were asked for before have not gone.
        :raises EngineError: no machine can have so many.
        """
        if self.leaving_to is not None:
            raise RemovalPending(f"The guest still has {self.vcpus} vCPUs and is to have {self.leaving_to}")
        if not 1 <= vcpus <= self.vm_config.cpus.max_vcpus:
            raise EngineError(f"The machine has room for 1 to {self.vm_config.cpus.max_vcpus} vCPUs")
        if vcpus < self.vcpus:
            self.leaving_to = vcpus
        else:
            self.vcpus = vcpus

    def drop_vcpus(self, vcpus: int) -> None:
        self.vcpus, self.leaving_to = vcpus, None

    def check_zone(self, zone_id: str) -> None:
        """:raises DeviceError: the zone has no virtio-mem device."""
        if zone_id not in self.plugged:
            raise DeviceError(f"The memory zone {zone_id} has no virtio-mem device")

    def check_balloon(self) -> None:
        """:raises DeviceError: there is no balloon."""
        if self.vm_config.balloon is None:
            raise DeviceError("The machine has no balloon")

    def resize_disk(self, disk_id: str, size_bytes: int) -> None:
        """Give the image file its new size.

        :raises DeviceError: there is no such disk, or its image cannot change its size.
        """
        disk = self._devices.get(disk_id)
        if not isinstance(disk, DiskConfig) or disk.path is None:
            raise DeviceError(f"There is no disk {disk_id}")
        if self.image_types.get(disk_id) is not ImageType.RAW or disk.readonly:
            raise DeviceError(f"The image {disk.path} cannot change its size")
        try:
            os.truncate(disk.path, size_bytes)
        except OSError as error:
            raise DeviceError(f"The image {disk.path} cannot change its size") from error


def _zone_ids(spec: MachineSpec) -> list[str]:
    """Return the ids of the virtio-mem devices: each has a slot under its zone's name."""
    memory = spec.vm_config.memory
    if memory.hotplug_method is not HotplugMethod.VIRTIO_MEM:
        return []
    zones = {zone.id for zone in memory.zones or () if zone.hotplug_size}
    return [device_id for device_id in spec.slots if device_id in zones or device_id == "mem0"]
