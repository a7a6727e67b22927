"""Changes to the config of a VM that is not booted: devices added and removed, sizes set.

Pure: each function takes the stored config and returns a changed copy.
"""

from __future__ import annotations

import copy
from typing import Any, Final

from cloudvmm.api.error import ConfigValidation, NoDeviceToRemove, ResizeZone, TooManyVsockDevices
from cloudvmm.config.device import (
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
from cloudvmm.config.net import NetConfig
from cloudvmm.config.operation import VmResizeData, VmResizeZoneData
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.rule import validate
from cloudvmm.config.vm import VmConfig

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


def with_device(vm_config: VmConfig, device: PciDevice) -> VmConfig:
    """Return `vm_config` plus `device`.

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
        validate(copy.deepcopy(changed))
    except ValidationError as error:
        raise ConfigValidation from error
    return changed


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
