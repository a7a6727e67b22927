"""Disks that a vhost-user back end serves, such as qemu-storage-daemon or SPDK.

A back end that went away and comes back is connected again, and goes on with what was under way. QEMU would
wait for a back end that does not talk without end, so a relay has each connection, and has the back end talk
before QEMU has it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Final

from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.vhost_user import VhostUserMissingSocket
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.vhost_user import (
    RelayedBacking,
    VhostUserBacking,
    open_connection,
    vhost_user_chardev,
)
from cloudvmm.engine.qemu.vhost_user_relay import Relay
from cloudvmm.host.user import User

_RECONNECT_S: Final = 1


class VhostUserDiskError(DeviceError):
    """Cannot create vhost-user-blk device"""


def open_vhost_user_disk(disk: DiskConfig, attempt: Attempt) -> RelayedBacking:
    """Blocking. Connect to the back end at the socket of `disk`. The caller owns the result.

    :raises VhostUserDiskError: there is none, or it does not talk as one should; the causes tell why.
    :raises MachineGone: `attempt` was aborted.
    """
    device_id = id_of(disk.id)
    try:
        if disk.vhost_socket is None:
            raise VhostUserMissingSocket
        connect = partial(_connect, disk.vhost_socket, disk.num_queues)
        relay = _relay(connect(attempt), connect, attempt.user)
    except (VhostUserMissingSocket, DeviceError) as error:
        raise VhostUserDiskError from error
    return RelayedBacking(device_id=device_id, path=relay.path, relay=relay)


def _connect(path: str, queues: int, attempt: Attempt) -> socket.socket:
    connection, _ = open_connection(path, queues=queues, attempt=attempt)
    connection.settimeout(None)
    return connection


def _relay(connection: socket.socket, renew: Callable[[Attempt], socket.socket], user: User | None) -> Relay:
    try:
        return Relay(connection, renew=renew, user=user)
    except BaseException:
        connection.close()
        raise


def vhost_user_disk_parts(disk: DiskConfig, backing: VhostUserBacking, seat: Seat) -> Parts:
    """Describe `disk` on its back end."""
    in_ms = seat.facts.reconnects_in_ms
    reconnect = {"reconnect-ms": _RECONNECT_S * 1000} if in_ms else {"reconnect": _RECONNECT_S}
    chardev = vhost_user_chardev(backing, reconnect=reconnect)
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
