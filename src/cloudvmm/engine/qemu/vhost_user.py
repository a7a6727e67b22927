"""What every vhost-user device has: the character device over which QEMU and a back end talk."""

from __future__ import annotations

import os

from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.companion import Companion
from cloudvmm.engine.qemu.name import part_id
from cloudvmm.engine.qemu.parts import Properties


class VhostUserConnectError(DeviceError):
    """Cannot connect to the vhost-user back end"""


class VhostUserBacking(Backing, kw_only=True):
    """Either the `path` of a socket at which the user's back end serves, or our end `fd` of a connection.

    `companion` is the back end where it is ours.
    """

    path: str | None = None
    fd: int = -1
    companion: Companion | None = None

    @property
    def fds(self) -> list[int]:
        return [] if self.fd < 0 else [self.fd]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.companion is not None:
            self.companion.close()
            self.companion = None


def vhost_user_chardev(backing: VhostUserBacking) -> Properties:
    """Describe the character device of `backing`."""
    if backing.path is None:
        address: Properties = {"type": "fd", "data": {"str": str(backing.fd)}}
    else:
        address = {"type": "unix", "data": {"path": os.path.abspath(backing.path)}}
    return {
        "id": part_id(backing.device_id, "chr"),
        "backend": {"type": "socket", "data": {"addr": address, "server": False}},
    }
