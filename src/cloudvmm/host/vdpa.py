"""vDPA devices of the host, /dev/vhost-vdpa-N: open one and see what it is."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import ExitStack
from typing import Final

from cloudvmm.host.error import HostError

_VHOST_GET_FEATURES: Final = 0x8008AF00
_VHOST_VDPA_GET_DEVICE_ID: Final = 0x8004AF70
_VHOST_VDPA_GET_STATUS: Final = 0x8001AF71
_VHOST_VDPA_GET_VQS_COUNT: Final = 0x8004AF80
_ACCESS_PLATFORM: Final = 1 << 33
_DRIVER_OK: Final = 4


class VdpaError(HostError):
    """Root of what goes wrong with a vDPA device"""


class OpenVdpa(VdpaError):
    """Failed to create vhost-vdpa"""


class NotVdpa(VdpaError):
    def __init__(self, path: str) -> None:
        super().__init__(f"Get virtio device identifier: {path} is no vDPA device")


class NoAccessPlatform(VdpaError):
    """Missing VIRTIO_F_ACCESS_PLATFORM feature"""


class TooFewVdpaQueues(VdpaError):
    def __init__(self, has: int, wanted: int) -> None:
        super().__init__(f"The vDPA device has {has} queues, and {wanted} are asked for")


def open_vdpa(path: str, *, queues: int) -> int:
    """Open the device at `path`, which must have `queues` or more. The caller owns the descriptor.

    Nobody else can open it meanwhile.

    :raises VdpaError: it cannot be had.
    """
    with ExitStack() as undo:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise OpenVdpa from error
        undo.callback(os.close, fd)
        try:
            _read(fd, _VHOST_VDPA_GET_DEVICE_ID, "I")
            features = _read(fd, _VHOST_GET_FEATURES, "Q")
            has = _read(fd, _VHOST_VDPA_GET_VQS_COUNT, "I")
        except OSError as error:
            raise NotVdpa(path) from error
        if not features & _ACCESS_PLATFORM:
            raise NoAccessPlatform
        if queues > has:
            raise TooFewVdpaQueues(has, queues)
        undo.pop_all()
    return fd


def is_driven(fd: int) -> bool:
    """Say whether a driver has told the device open as `fd` that it is ready.

    :raises OSError: `fd` is no such device.
    """
    return bool(_read(fd, _VHOST_VDPA_GET_STATUS, "B") & _DRIVER_OK)


def _read(fd: int, request: int, form: str) -> int:
    buffer = bytearray(struct.calcsize(form))
    fcntl.ioctl(fd, request, buffer)
    (value,) = struct.unpack(form, buffer)
    return int(value)
