"""What a device stands on outside QEMU: descriptors, locks, connections, helper programs.

Each kind of device has a backing of its own, beside its parts; `kind.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import DeviceError, DriverKind


class MissingDeviceId(DeviceError):
    """A device reached the engine without an id"""


class Backing(msgspec.Struct, kw_only=True):
    """Opened for one device and owned by the machine's `Resources`.

    It is used by one thread at a time. None of its methods waits for QEMU or for the guest: the control loop
    calls `release` and `close`, too. `stays` tells why the device cannot be removed from a guest that runs,
    `unsaved` why a guest that has it cannot be saved, where QEMU itself would not say so.
    """

    device_id: str
    stays: str | None = None
    unsaved: str | None = None

    @property
    def fds(self) -> list[int]:
        """Descriptors that a QEMU which starts with the device must have under the same numbers."""
        return []

    @property
    def held_fds(self) -> list[int]:
        """Descriptors that we hold for the device, and QEMU in some way, too."""
        return self.fds

    @property
    def interface(self) -> str | None:
        """The network interface on the host whose traffic is the device's, if it lies in our namespace."""
        return None

    @property
    def driver_kind(self) -> DriverKind:
        """How it is told that the guest's driver has taken the device, or reset it."""
        return DriverKind.VIRTIO

    @property
    def maps_memory(self) -> bool:
        """Whether a program beside QEMU maps the guest's memory for the device."""
        return False

    @property
    def needs_network(self) -> bool:
        """Whether QEMU itself sends to the network, and receives from it."""
        return False

    def has_driver(self) -> bool | None:
        """Say whether the guest's driver is ready; None where QEMU is to be asked. Any thread."""
        return None

    def move(self, find: Callable[[int], int]) -> None:
        """Stand on other descriptors: `find` gives what each number of before is now, for us to own.

        It gives -1 for what is gone.
        """

    def check_in(self, vm_config: VmConfig) -> None:
        """Raise what keeps the device out of a machine of `vm_config`, for reasons beside the device.

        :raises DeviceError: there is something.
        """

    def lock(self) -> None:
        """Keep others from the images below; to be done before QEMU opens them.

        :raises ImageLocked: another process holds one.
        """

    def release(self) -> None:
        """Let others have what the device stands on, for as far as QEMU needs none of it of us. Idempotent.

        The guest was asked to let go of the device, and may use it until it does.
        """

    def close(self) -> None:
        """Close and end everything; the device is gone, or its QEMU is about to be. Idempotent."""


def id_of(device_id: str | None) -> str:
    """:raises MissingDeviceId: there is none."""
    if device_id is None:
        raise MissingDeviceId
    return device_id
