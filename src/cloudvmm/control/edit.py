"""Changes to a stored config: devices added and removed, sizes set.

Pure: each function takes the stored config and returns a changed copy. Those on sizes of a booted VM share
with the old one what did not change, so that they cost next to nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from cloudvmm.api.error import ConfigValidation, NoDeviceToRemove, ResizeZone, TooManyVsockDevices
from cloudvmm.config.device import (
    BalloonConfig,
    DeviceConfig,
    FsConfig,
    GenericVhostUserConfig,
    PmemConfig,
    UserDeviceConfig,
    VdpaConfig,
    VsockConfig,
)
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.error import ValidationError
from cloudvmm.config.memory import HotplugMethod
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import VmResizeData, VmResizeZoneData
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.rule import validate
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn, unheard

LISTS: Final[dict[type[PciDevice], str]] = {
    DiskConfig: "disks",
    NetConfig: "net",
    FsConfig: "fs",
    GenericVhostUserConfig: "generic_vhost_user",
    PmemConfig: "pmem",
    DeviceConfig: "devices",
    UserDeviceConfig: "user_devices",
    VdpaConfig: "vdpa",
}


def with_device(vm_config: VmConfig, device: PciDevice, warn: Warn = unheard) -> tuple[VmConfig, PciDevice]:
    """Return `vm_config` plus a copy of `device`, and that copy, which the caller may still complete.

    :raises ConfigValidation: the two together break a rule.
    :raises TooManyVsockDevices: there is a vsock device already.
    """
    changed, device = copy.deepcopy((vm_config, device))
    if isinstance(device, VsockConfig):
        if changed.vsock is not None:
            raise TooManyVsockDevices
        changed.vsock = device
    else:
        name = LISTS[type(device)]
        setattr(changed, name, [*(getattr(changed, name) or []), device])
    try:
        validate(copy.deepcopy(changed), warn)
    except ValidationError as error:
        raise ConfigValidation from error
    return changed, device


def find_device(vm_config: VmConfig, device_id: str) -> PciDevice:
    """Return the device that can be added and removed and has this id.

    :raises NoDeviceToRemove: there is none.
    """
    lists = (getattr(vm_config, name) or () for name in LISTS.values())
    devices: Iterator[PciDevice] = (device for devices in lists for device in devices)
    for device in (*devices, vm_config.vsock):
        if device is not None and device.id == device_id:
            return device
    raise NoDeviceToRemove(device_id)


def without_device(vm_config: VmConfig, device_id: str) -> tuple[VmConfig, Any]:
    """Return `vm_config` less the device, and the device.

    :raises NoDeviceToRemove: no removable device has this id.
    """
    changed = copy.deepcopy(vm_config)
    for name in LISTS.values():
        devices = getattr(changed, name) or []
        for device in devices:
            if device.id == device_id:
                setattr(changed, name, [other for other in devices if other is not device])
                return changed, device
    if changed.vsock is not None and changed.vsock.id == device_id:
        removed, changed.vsock = changed.vsock, None
        return changed, removed
    raise NoDeviceToRemove(device_id)


def with_sizes(vm_config: VmConfig, sizes: VmResizeData) -> VmConfig:
    """Return `vm_config` with the sizes set, unchecked: a bad value shows at boot."""
    changed = copy.deepcopy(vm_config)
    if sizes.desired_vcpus is not None:
        changed.cpus.boot_vcpus = sizes.desired_vcpus
    if sizes.desired_ram is not None:
        changed.memory.size = sizes.desired_ram
    if sizes.desired_balloon is not None and changed.balloon is not None:
        changed.balloon.size = sizes.desired_balloon
    return changed


def with_zone_size(vm_config: VmConfig, zone_size: VmResizeZoneData) -> VmConfig:
    """Return `vm_config` with the zone's size set.

    :raises ResizeZone: there is no such zone.
    """
    changed = copy.deepcopy(vm_config)
    for zone in changed.memory.zones or []:
        if zone.id == zone_size.id:
            zone.size = zone_size.desired_ram
            return changed
    raise ResizeZone


def with_vcpus(vm_config: VmConfig, vcpus: int) -> VmConfig:
    return msgspec.structs.replace(vm_config, cpus=msgspec.structs.replace(vm_config.cpus, boot_vcpus=vcpus))


def with_ram(vm_config: VmConfig, ram_bytes: int) -> VmConfig:
    """Return `vm_config` with RAM of that size; virtio-mem leaves `memory.size` as it is."""
    memory = vm_config.memory
    if memory.hotplug_method is HotplugMethod.ACPI:
        return msgspec.structs.replace(vm_config, memory=msgspec.structs.replace(memory, size=ram_bytes))
    return msgspec.structs.replace(
        vm_config, memory=msgspec.structs.replace(memory, hotplugged_size=ram_bytes - memory.size or None)
    )


def with_balloon(vm_config: VmConfig, balloon: BalloonConfig, balloon_bytes: int) -> VmConfig:
    return msgspec.structs.replace(vm_config, balloon=msgspec.structs.replace(balloon, size=balloon_bytes))


def with_zone_plugged(vm_config: VmConfig, zone_id: str, plugged_bytes: int) -> VmConfig:
    zones = [
        msgspec.structs.replace(zone, hotplugged_size=plugged_bytes) if zone.id == zone_id else zone
        for zone in vm_config.memory.zones or []
    ]
    return msgspec.structs.replace(vm_config, memory=msgspec.structs.replace(vm_config.memory, zones=zones))
