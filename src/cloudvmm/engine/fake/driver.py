"""The guest's drivers: which virtio devices they have in use. Public, as `machine.drivers`.

Left alone, a guest takes every virtio device into use when it boots, and each one that is plugged later.
"""

from __future__ import annotations

from collections.abc import Callable

from cloudvmm.config.device import DeviceConfig, UserDeviceConfig, VdpaConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.engine.base import DriverChanged, EngineError, EngineEvent, MachineSpec

_OTHERS = ("__pvpanic", "__watchdog", "__ivshmem")


class FakeDrivers:
    """Any thread may play them; `tell` raises an EngineError where the guest does not run."""

    def __init__(self, tell: Callable[[EngineEvent], None]) -> None:
        self._tell = tell
        self._active: set[str] = set()

    def bind(self, device_id: str) -> None:
        """Take a device into use, as the driver's `bind` does.

        :raises EngineError: it is in use, or the guest does not run.
        """
        if device_id in self._active:
            raise EngineError(f"A driver has {device_id} already")
        self._tell(DriverChanged(device_id, is_active=True))
        self._active.add(device_id)

    def unbind(self, device_id: str) -> None:
        """Reset a device, as the driver's `unbind` does.

        :raises EngineError: no driver has it, or the guest does not run.
        """
        if device_id not in self._active:
            raise EngineError(f"No driver has {device_id}")
        self._tell(DriverChanged(device_id, is_active=False))
        self._active.discard(device_id)

    @property
    def active(self) -> list[str]:
        """The devices that are in use, by name."""
        return sorted(self._active)

    def keep(self, device_ids: list[str]) -> None:
        """The machine's: the guest goes on from a state in which these were in use."""
        self._active.update(device_ids)

    def forget(self, device_id: str) -> bool:
        """The machine's: the device is gone; return whether a driver had it."""
        was_active = device_id in self._active
        self._active.discard(device_id)
        return was_active


def is_virtio(device: PciDevice) -> bool:
    """Whether a virtio driver of the guest takes `device`."""
    return not isinstance(device, DeviceConfig | UserDeviceConfig | VdpaConfig)


def virtio_ids(spec: MachineSpec) -> list[str]:
    """Return the ids of the devices that a virtio driver of the guest would take."""
    vm_config = spec.vm_config
    lists = (vm_config.devices, vm_config.user_devices, vm_config.vdpa)
    others = {device.id for devices in lists for device in devices or ()}
    if vm_config.ivshmem is not None:
        others.add(vm_config.ivshmem.id)
    return [name for name in spec.slots if name not in others and name not in _OTHERS]
