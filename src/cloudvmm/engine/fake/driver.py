"""The guest's drivers: which devices they have in use. Public, as `machine.drivers`.

Left alone, a guest takes every virtio and vDPA device into use when it boots, and each one that is plugged
later.
"""

from __future__ import annotations

from collections.abc import Callable

from cloudvmm.config.device import DeviceConfig, UserDeviceConfig, VdpaConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import DriverChanged, DriverKind, EngineError, EngineEvent, MachineSpec

_OTHERS = ("__pvpanic", "__watchdog", "__ivshmem", "__pvmemcontrol")


class FakeDrivers:
    """Any thread may play them; `tell` raises an EngineError where the guest does not run."""

    def __init__(self, tell: Callable[[EngineEvent], None], vm_config: VmConfig) -> None:
        self._tell = tell
        self._active: set[str] = set()
        self._kinds: dict[str, DriverKind] = {}
        for devices in (vm_config.disks, vm_config.net, vm_config.vdpa):
            for device in devices or ():
                self.know(device)

    def bind(self, device_id: str) -> None:
        """Take a device into use, as the driver's `bind` does.

        :raises EngineError: it is in use, or the guest does not run.
        """
        if device_id in self._active:
            raise EngineError(f"A driver has {device_id} already")
        self._tell(self.change(device_id, is_active=True))
        self._active.add(device_id)

    def unbind(self, device_id: str) -> None:
        """Reset a device, as the driver's `unbind` does.

        :raises EngineError: no driver has it, or the guest does not run.
        """
        if device_id not in self._active:
            raise EngineError(f"No driver has {device_id}")
        self._tell(self.change(device_id, is_active=False))
        self._active.discard(device_id)

    @property
    def active(self) -> list[str]:
        """The devices that are in use, by name."""
        return sorted(self._active)

    def know(self, device: PciDevice) -> None:
        """The machine's: `device` is there, and is to be told of as what it is, until it is gone."""
        kind = _kind(device)
        if device.id is not None and kind is not DriverKind.VIRTIO:
            self._kinds[device.id] = kind

    def change(self, device_id: str, *, is_active: bool) -> DriverChanged:
        """The machine's: return what tells that a driver has taken a device, or has reset it."""
        return DriverChanged(device_id, is_active, self._kinds.get(device_id, DriverKind.VIRTIO))

    @property
    def kinds(self) -> dict[str, DriverKind]:
        """Of which kind the devices are that are not VIRTIO; also those that the config has no more."""
        return dict(self._kinds)

    def keep(self, device_ids: list[str], kinds: dict[str, DriverKind]) -> None:
        """The machine's: the guest goes on from a state in which these were in use, and of these kinds."""
        self._active.update(device_ids)
        self._kinds.update(kinds)

    def forget(self, device_id: str) -> DriverChanged | None:
        """The machine's: the device is gone; return the reset of one that a driver had."""
        reset = self.change(device_id, is_active=False) if device_id in self._active else None
        self._active.discard(device_id)
        self._kinds.pop(device_id, None)
        return reset


def _kind(device: PciDevice) -> DriverKind:
    if isinstance(device, VdpaConfig):
        return DriverKind.VDPA
    if isinstance(device, DiskConfig | NetConfig) and device.vhost_user:
        return DriverKind.VHOST_USER
    return DriverKind.VIRTIO


def has_driver(device: PciDevice) -> bool:
    """Whether a driver of the guest takes `device` and is told of."""
    return not isinstance(device, DeviceConfig | UserDeviceConfig)


def driven_ids(spec: MachineSpec) -> list[str]:
    """Return the ids of the devices that have such a driver."""
    vm_config = spec.vm_config
    lists = (vm_config.devices, vm_config.user_devices)
    others = {device.id for devices in lists for device in devices or ()}
    if vm_config.ivshmem is not None:
        others.add(vm_config.ivshmem.id)
    return [name for name in spec.slots if name not in others and name not in _OTHERS]
