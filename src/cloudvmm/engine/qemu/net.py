"""Network devices: virtio-net on TAP queues that are open already, on user-mode networking or a back end."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import msgspec

from cloudvmm.config.net import NetConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import Backing, id_of
from cloudvmm.engine.qemu.name import part_id, qdev_id
from cloudvmm.engine.qemu.net_limit import bucket_of
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.user_net import UserNetBacking, open_user_net, user_netdev
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking, vhost_user_chardev
from cloudvmm.host.limit import Limit, LimitError, clear
from cloudvmm.host.tap import TapError, interface_of, open_tap

# What QEMU accepts: rings of 256 to 1024, and for transmission none but 256 unless a back end has the rings.
_MIN_RING: Final = 256
_MAX_RING: Final = 1024

_CHECKSUM: Final = ("csum", "guest_csum")
_SEGMENTATION: Final = ("host_tso4", "host_tso6", "host_ecn", "guest_tso4", "guest_tso6", "guest_ecn")
_FRAGMENTATION: Final = ("host_ufo", "guest_ufo")


class TapOpenError(DeviceError):
    """Cannot open tap interface"""


class FdNotUsable(DeviceError):
    def __init__(self, device_id: str, fd: int) -> None:
        super().__init__(f"File descriptor {fd} of {device_id} cannot be used")


class RateLimitError(DeviceError):
    """Cannot limit the rate of the tap interface"""


class TapElsewhere(DeviceError):
    """Its file descriptor belongs to an interface of another network namespace"""


class NetBacking(Backing, kw_only=True):
    """`queues` are descriptors of a TAP, one for each pair; `tap` is its name if it lies in our namespace."""

    queues: list[int] = msgspec.field(default_factory=list)
    tap: str | None = None
    limit: Limit | None = None

    @property
    def fds(self) -> list[int]:
        return self.queues

    @property
    def interface(self) -> str | None:
        return self.tap

    def move(self, find: Callable[[int], int]) -> None:
        self.queues = [queue for queue in map(find, self.queues) if queue >= 0]

    def release(self) -> None:
        while self.queues:
            os.close(self.queues.pop())

    def close(self) -> None:
        if self.limit is not None:
            self.limit.close()
            self.limit = None
        self.release()


def open_net(net: NetConfig, attempt: Attempt) -> Backing:
    """Blocking. Make ready what `net` stands on, as its configuration says. The caller owns the result.

    :raises DeviceError: it cannot be had. :raises MachineGone: `attempt` was aborted.
    """
    if net.user is not None:
        return open_user_net(net, net.user, attempt)
    if net.vhost_user:
        from cloudvmm.engine.qemu.vhost_user_net import open_vhost_user_net  # rare, and imports much

        return open_vhost_user_net(net, attempt)
    backing = _open_tap(net)
    try:
        backing.limit = _limit(net, backing)
    except BaseException:
        backing.close()
        raise
    return backing


def _limit(net: NetConfig, backing: NetBacking) -> Limit | None:
    bucket = bucket_of(net.rate_limiter_config, queue_pairs=net.num_queues // 2)
    if bucket is None:
        if backing.tap is not None:
            clear(backing.tap)
        return None
    try:
        if backing.tap is None:
            raise TapElsewhere
        return Limit(backing.tap, bucket)
    except (LimitError, TapElsewhere) as error:
        raise RateLimitError from error


def _open_tap(net: NetConfig) -> NetBacking:
    """Attach to the TAP of `net`, create it, or duplicate what is passed."""
    net_id = id_of(net.id)
    if net.fds:
        return _duplicate_queues(net_id, net.fds)
    try:
        tap = open_tap(
            net.tap,
            queue_pairs=net.num_queues // 2,
            ip=net.ip,
            mask=net.mask,
            mac=net.host_mac,
            mtu=net.mtu,
        )
    except TapError as error:
        raise TapOpenError from error
    return NetBacking(device_id=net_id, queues=tap.fds, tap=tap.name)


def _duplicate_queues(net_id: str, fds: list[int]) -> NetBacking:
    with ExitStack() as undo:
        queues: list[int] = []
        for fd in fds:
            try:
                queues.append(os.dup(fd))
            except OSError as error:
                raise FdNotUsable(net_id, fd) from error
            undo.callback(os.close, queues[-1])
            os.set_blocking(queues[-1], False)
        undo.pop_all()
    return NetBacking(device_id=net_id, queues=queues, tap=interface_of(queues[0]))


def net_parts(net: NetConfig, backing: Backing, seat: Seat) -> Parts:
    """Describe `net` on what it stands on."""
    backend = part_id(backing.device_id, "net")
    pairs = net.num_queues // 2
    device: Properties = {
        "driver": "virtio-net-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "disable-legacy": "on",
        "netdev": backend,
        "romfile": "",
        "rx_queue_size": _ring(net),
        **_offloads(net),
    }
    if isinstance(backing, VhostUserBacking):
        device["tx_queue_size"] = _ring(net)
    if net.mac is not None:
        device["mac"] = net.mac
    if net.mtu is not None:
        device["host_mtu"] = net.mtu
    if pairs > 1:
        # One vector for each queue, one for the control queue and one for changes of the configuration.
        device |= {"mq": True, "vectors": 2 * pairs + 2}
    match backing:
        case VhostUserBacking():
            if not seat.facts.masks_vectors:
                device["vectors"] = 0  # with MSI-X it would crash
            chardev = vhost_user_chardev(backing)
            netdev = {"type": "vhost-user", "id": backend, "chardev": chardev["id"], "queues": pairs}
            return Parts(chardevs=[chardev], netdevs=[netdev], devices=[device])
        case UserNetBacking():
            netdev = user_netdev(backing, netdev_id=backend)
        case _:
            netdev = {"type": "tap", "id": backend, "vhost": False, "fds": backing.fds}
    return Parts(netdevs=[netdev], devices=[device])


def _ring(net: NetConfig) -> int:
    return max(_MIN_RING, min(net.queue_size, _MAX_RING))


def _offloads(net: NetConfig) -> Properties:
    return {
        **dict.fromkeys(_CHECKSUM, net.offload_csum),
        **dict.fromkeys(_SEGMENTATION, net.offload_tso),
        **dict.fromkeys(_FRAGMENTATION, net.offload_ufo),
    }
