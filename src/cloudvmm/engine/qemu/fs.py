"""File systems: a vhost-user-fs device, whose back end is the user's or one that we start for a folder."""

from __future__ import annotations

from cloudvmm.config.device import FsConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking, open_vhost_user, vhost_user_chardev


class CreateVirtioFs(DeviceError):
    """Cannot create virtio-fs device"""


def open_fs(fs: FsConfig, attempt: Attempt) -> VhostUserBacking:
    """Blocking. Connect to the back end of `fs`, or start one. The caller owns the result.

    :raises DeviceError: it cannot be had; the cause tells why.
    :raises MachineGone: `attempt` was aborted.
    """
    queues = fs.num_queues + 1  # one for what is urgent
    try:
        if fs.socket is not None:
            return open_vhost_user(fs.id, fs.socket, queues=queues, attempt=attempt)
        from cloudvmm.engine.qemu.virtiofsd import share  # rare

        return share(fs.id, fs.shared_dir or "", queues=queues, attempt=attempt)
    except DeviceError as error:
        raise CreateVirtioFs from error


def fs_parts(fs: FsConfig, backing: VhostUserBacking, seat: Seat) -> Parts:
    """Describe `fs` on the connection to its back end."""
    chardev = vhost_user_chardev(backing)
    device = {
        "driver": "vhost-user-fs-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "chardev": chardev["id"],
        "tag": fs.tag,
        "num-request-queues": fs.num_queues,
        "queue-size": fs.queue_size,
    }
    return Parts(chardevs=[chardev], devices=[device])
