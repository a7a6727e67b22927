"""vfio-user devices: a program of the user's serves a PCI device over a socket.

QEMU speaks with it. It connects by itself, by the socket's path, since it takes no open connection; a server
has one client, so we cannot try beforehand.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from cloudvmm.config.device import UserDeviceConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.backing import Backing, id_of
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts
from cloudvmm.engine.qemu.seat import Seat

_LONGEST_PATH_BYTES: Final = 107  # of Linux, for the address of a UNIX socket


class VfioUserClientError(DeviceError):
    """Failed to create vfio-user client"""


class NoSocket(DeviceError):
    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is not a socket")


class SocketPathTooLong(DeviceError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The path of the socket is longer than {_LONGEST_PATH_BYTES} bytes: {path}")


class UserDeviceBacking(Backing, kw_only=True):
    """The `path` of a socket at which the user's program serves one device."""

    path: str

    @property
    def maps_memory(self) -> bool:
        return True


def open_user_device(device: UserDeviceConfig) -> UserDeviceBacking:
    """Look whether there is a socket; what listens there is QEMU's to find out.

    :raises VfioUserClientError: there is none; the cause tells why.
    """
    path = os.path.abspath(device.socket)
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise NoSocket(path)
        if len(os.fsencode(path)) > _LONGEST_PATH_BYTES:
            raise SocketPathTooLong(path)
    except (OSError, ValueError, NoSocket, SocketPathTooLong) as error:
        raise VfioUserClientError from error
    return UserDeviceBacking(
        device_id=id_of(device.id), path=path, unsaved="QEMU does not save vfio-user devices"
    )


def user_device_parts(device: UserDeviceConfig, backing: UserDeviceBacking, seat: Seat) -> Parts:
    """Describe `device` at its socket."""
    return Parts(
        devices=[
            {
                "driver": "vfio-user-pci",
                "id": qdev_id(backing.device_id),
                **seat.place(backing.device_id),
                "socket": {"type": "unix", "path": backing.path},
            }
        ]
    )
