"""vDPA devices: virtio devices that hardware of the host serves, or a process, behind /dev/vhost-vdpa-N.

QEMU takes what the device is, and how many queues it has, from the device.
"""

from __future__ import annotations

import contextlib
import os
import threading

import msgspec

from cloudvmm.config.device import VdpaConfig
from cloudvmm.engine.base import DeviceError, DriverKind
from cloudvmm.engine.qemu.backing import Backing, id_of
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import FdSet, Parts
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.host.vdpa import VdpaError, is_driven, open_vdpa


class VdpaCreateError(DeviceError):
    """Cannot create vdpa device"""


class VdpaBacking(Backing, kw_only=True):
    """The open device, which QEMU has from us: it can be opened once only.

    We keep it open until QEMU has closed it, for what the guest's driver does is asked of the device: QEMU
    10.0 dies of ``x-query-virtio-status`` about one that is in use.
    """

    fd: int
    guard: threading.Lock = msgspec.field(default_factory=threading.Lock)

    @property
    def fds(self) -> list[int]:
        return [] if self.fd < 0 else [self.fd]

    @property
    def driver_kind(self) -> DriverKind:
        return DriverKind.VDPA

    def has_driver(self) -> bool:
        with self.guard, contextlib.suppress(OSError):
            return self.fd >= 0 and is_driven(self.fd)
        return False

    def close(self) -> None:
        with self.guard:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


def open_vdpa_device(vdpa: VdpaConfig) -> VdpaBacking:
    """Open the device of `vdpa`. The caller owns the result.

    :raises VdpaCreateError: it cannot be had; the cause tells why.
    """
    device_id = id_of(vdpa.id)
    try:
        return VdpaBacking(device_id=device_id, fd=open_vdpa(vdpa.path, queues=vdpa.num_queues))
    except VdpaError as error:
        raise VdpaCreateError from error


def vdpa_parts(_vdpa: VdpaConfig, backing: VdpaBacking, seat: Seat) -> Parts:
    """Describe a vDPA device."""
    fdset = FdSet(backing.fd, seat.first_fdset)
    device = {
        "driver": "vhost-vdpa-device-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "disable-legacy": "on",
        "vhostdev": fdset.path,
    }
    return Parts(fdsets=[fdset], devices=[device])
