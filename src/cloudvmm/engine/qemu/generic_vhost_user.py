"""vhost-user devices of any type that QEMU has by name.

The device that takes any type (``vhost-user-device-pci``) cannot be made by a user of QEMU, in no version. So
each type is QEMU's own, which knows how many queues it has, and sometimes of what size.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cloudvmm.config.device import GenericVhostUserConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking, open_vhost_user, vhost_user_chardev

_FS: Final = 26
_FS_TAG_BYTES: Final = 36


class CreateGenericVhostUser(DeviceError):
    """Cannot create generic vhost-user device"""


class NoSuchVhostUserDevice(DeviceError):
    def __init__(self, device_type: int) -> None:
        super().__init__(f"QEMU has no vhost-user device of type {device_type}")


class QueuesNotPossible(DeviceError):
    """QEMU cannot give a device the queues asked for; the text says what it can."""


class Native(msgspec.Struct, frozen=True, kw_only=True):
    """A device of QEMU: `queues` that it has beside those in its property `count`, all as `size` says.

    Without `count` it has no others; without `size` QEMU chose their sizes. `own_queues` are QEMU's, not
    the back end's. One that is `old` too can be a device of before virtio 1.
    """

    driver: str
    queues: int = 0
    count: str | None = None
    size: str | None = None
    own_queues: int = 0
    old: bool = False


# By the number that the virtio specification gives a type of device.
NATIVES: Final[dict[int, Native]] = {
    2: Native(driver="vhost-user-blk-pci", count="num-queues", size="queue-size", old=True),
    4: Native(driver="vhost-user-rng-pci", queues=1),
    8: Native(driver="vhost-user-scsi-pci", queues=2, count="num_queues", size="virtqueue_size", old=True),
    18: Native(driver="vhost-user-input-pci", queues=2, old=True),
    19: Native(driver="vhost-user-vsock-pci", queues=3, own_queues=1, old=True),
    25: Native(driver="vhost-user-snd-pci", queues=4),
    _FS: Native(driver="vhost-user-fs-pci", queues=1, count="num-request-queues", size="queue-size"),
    34: Native(driver="vhost-user-i2c-pci", queues=1),
    41: Native(driver="vhost-user-gpio-pci", queues=2),
}


def open_generic_vhost_user(
    device: GenericVhostUserConfig, attempt: Attempt | None = None
) -> VhostUserBacking:
    """Blocking. Connect to the back end of `device`. The caller owns the result.

    :raises CreateGenericVhostUser: it cannot be had, or QEMU has no such device; the cause tells why.
    """
    try:
        _properties(device)
        return open_vhost_user(
            device.id,
            device.socket,
            queues=len(device.queue_sizes) - NATIVES[device.device_type].own_queues,
            config_bytes=_FS_TAG_BYTES if device.device_type == _FS else 0,
            attempt=attempt,
        )
    except DeviceError as error:
        raise CreateGenericVhostUser from error


def generic_vhost_user_parts(device: GenericVhostUserConfig, backing: VhostUserBacking, seat: Seat) -> Parts:
    """Describe `device` on the connection to its back end.

    :raises DeviceError: QEMU has no such device.
    """
    chardev = vhost_user_chardev(backing)
    properties = {
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "chardev": chardev["id"],
        **_properties(device),
    }
    if device.device_type == _FS:
        # The back end's, as in the reference, if it has one: QEMU does not ask.
        tag = backing.config.partition(b"\0")[0].decode(errors="replace")
        properties["tag"] = tag or backing.device_id
    return Parts(chardevs=[chardev], devices=[properties])


def _properties(device: GenericVhostUserConfig) -> Properties:
    """Return which device of QEMU `device` is, and with which queues.

    :raises NoSuchVhostUserDevice: there is none of this type.
    :raises QueuesNotPossible: it cannot have such queues.
    """
    native = NATIVES.get(device.device_type)
    if native is None:
        raise NoSuchVhostUserDevice(device.device_type)
    properties: Properties = {"driver": native.driver}
    if native.old:
        properties["disable-legacy"] = "on"
    counted = len(device.queue_sizes) - native.queues
    if native.count:
        properties[native.count] = counted
    if counted < 1 if native.count else counted:
        least = f"{native.queues + 1} or more" if native.count else native.queues
        raise QueuesNotPossible(
            f"{native.driver} cannot have {len(device.queue_sizes)} queues: it has {least}"
        )
    if native.size:
        if len(set(device.queue_sizes)) > 1:
            raise QueuesNotPossible(f"All queues of {native.driver} have one size")
        properties[native.size] = device.queue_sizes[0]
    return properties
