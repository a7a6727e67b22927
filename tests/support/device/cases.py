"""Every kind of device that the matrix goes through."""

from __future__ import annotations

from typing import Final

from support.device.case import DeviceCase
from support.device.disk import DiskCase
from support.device.fs import FsCase, GenericVhostUserCase, OwnFsCase
from support.device.net import NetCase
from support.device.net_user import NetUserCase
from support.device.net_vhost_user import NetVhostUserCase
from support.device.pmem import PmemCase
from support.device.user_device import UserDeviceCase
from support.device.vhost_user_disk import VhostUserDiskCase
from support.device.vsock import VsockCase

CASES: Final[tuple[type[DeviceCase], ...]] = (
    DiskCase,
    VhostUserDiskCase,
    NetCase,
    FsCase,
    OwnFsCase,
    GenericVhostUserCase,
    PmemCase,
    NetUserCase,
    NetVhostUserCase,
    VsockCase,
    UserDeviceCase,
)
