"""Disks that a vhost-user back end serves, such as qemu-storage-daemon or SPDK.

A back end that went away and comes back is connected again, and goes on with what was under way. QEMU waits
for a back end that does not listen without end, so it is looked at before.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.vhost_user import VhostUserMissingSocket
from cloudvmm.engine.base import DeviceError, DriverKind
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking, check_listens, vhost_user_chardev

_RECONNECT_S: Final = 1


class VhostUserDiskError(DeviceError):
    """Cannot create vhost-user-blk device"""


class VhostUserDiskBacking(VhostUserBacking, kw_only=True):
    @property
    def driver_kind(self) -> DriverKind:
        return DriverKind.VHOST_USER


def open_vhost_user_disk(disk: DiskConfig) -> VhostUserDiskBacking:
    """Make sure that a back end listens at the socket of `disk`, without a connection to it.

    :raises VhostUserDiskError: none does; the causes tell why.
    """
    try:
        if disk.vhost_socket is None:
            raise VhostUserMissingSocket
        check_listens(disk.vhost_socket)
    except (VhostUserMissingSocket, DeviceError) as error:
        raise VhostUserDiskError from error
    return VhostUserDiskBacking(device_id=id_of(disk.id), path=disk.vhost_socket)


def vhost_user_disk_parts(disk: DiskConfig, backing: VhostUserBacking, seat: Seat) -> Parts:
    """Describe `disk` on its back end."""
    chardev = vhost_user_chardev(backing, reconnect_s=_RECONNECT_S)
    device: Properties = {
        "driver": "vhost-user-blk-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "disable-legacy": "on",
        "chardev": chardev["id"],
        "num-queues": disk.num_queues,
        "queue-size": disk.queue_size,
        **({} if seat.boot_index is None else {"bootindex": seat.boot_index}),
    }
    return Parts(chardevs=[chardev], devices=[device])
