"""What every vhost-user device has: the character device over which QEMU and a back end talk."""

from __future__ import annotations

import errno
import os
import socket

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


def check_listens(path: str) -> None:
    """Make sure that a stream socket is open at `path`, unnoticed by who has it.

    A back end may end with its first connection, so none is made: a datagram socket is refused by a living
    stream socket for its type.

    :raises VhostUserConnectError: there is none; the cause tells why.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                error.filename = path
                raise VhostUserConnectError from error
        except ValueError as error:  # a NUL character in the path
            raise VhostUserConnectError from error
        else:
            raise VhostUserConnectError from OSError(errno.EPROTOTYPE, os.strerror(errno.EPROTOTYPE), path)


def vhost_user_chardev(backing: VhostUserBacking, *, reconnect_s: int | None = None) -> Properties:
    """Describe the character device of `backing`; with `reconnect_s`, QEMU tries as often to have it again.

    With it, QEMU stands still until there is a connection: see `check_listens`.
    """
    if backing.path is None:
        address: Properties = {"type": "fd", "data": {"str": str(backing.fd)}}
    else:
        address = {"type": "unix", "data": {"path": os.path.abspath(backing.path)}}
    data: Properties = {"addr": address, "server": False}
    if reconnect_s is not None:
        data["reconnect"] = reconnect_s
    return {"id": part_id(backing.device_id, "chr"), "backend": {"type": "socket", "data": data}}
