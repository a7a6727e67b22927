"""Network devices of a VM."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from cloudvmm.config.error import ValidationError
from cloudvmm.config.number import I32, U16, U64
from cloudvmm.config.pci import IommuNotSupported, PciDevice, check_pci_device
from cloudvmm.config.queue import TooManyQueues, check_queue_size
from cloudvmm.config.rate_limit import RateLimiterConfig
from cloudvmm.config.user_net import UserNetConfig, check_forwards
from cloudvmm.config.vhost_user import check_vhost_user

if TYPE_CHECKING:
    from cloudvmm.config.vm import VmConfig


class VhostMode(enum.Enum):
    CLIENT = "Client"
    SERVER = "Server"


class NetConfig(PciDevice, kw_only=True):
    """`num_queues` counts receive and transmit queues, so one pair is 2.

    `fds` are open TAP descriptors, one per queue pair. They belong to the VMM from the moment the
    configuration is handed over; from JSON they are never honoured.

    `user` is beyond the reference, and left out where it is unset.
    """

    tap: str | None = None
    ip: str | None = None
    mask: str | None = None
    mac: str | None = None
    host_mac: str | None = None
    mtu: U16 | None = None
    num_queues: U64 = 2
    queue_size: U16 = 256
    vhost_user: bool = False
    vhost_socket: str | None = None
    vhost_mode: VhostMode = VhostMode.CLIENT
    fds: list[I32] | None = None
    rate_limiter_config: RateLimiterConfig | None = None
    offload_tso: bool = True
    offload_ufo: bool = True
    offload_csum: bool = True
    user: UserNetConfig | None = None


MINIMUM_MTU = 1280
USER_NET_QUEUES = 2
LAST_STANDARD_FD = 2


class VnetQueueLowerThan2(ValidationError):
    def __init__(self, queues: int) -> None:
        super().__init__(f"Number of queues ({queues}) to virtio_net should be higher than 2")


class VnetQueueFdMismatch(ValidationError):
    def __init__(self, queues: int, queues_of_fds: int) -> None:
        super().__init__(
            f"Number of queues ({queues}) to virtio_net does not match the number of FDs ({queues_of_fds})"
        )


class VnetReservedFd(ValidationError):
    def __init__(self, fd: int) -> None:
        super().__init__(f"Reserved fd number (<= {LAST_STANDARD_FD}): {fd}")


class InvalidMtu(ValidationError):
    def __init__(self, mtu: int) -> None:
        super().__init__(f"Provided MTU {mtu} is lower than {MINIMUM_MTU} (expected by VIRTIO specification)")


class NoHardwareChecksumOffload(ValidationError):
    """ "offload_tso" and "offload_ufo" depend on "offload_csum" """


class MaskProvidedWithoutIp(ValidationError):
    """Mask provided without an IP"""


class IpProvidedWithoutMask(ValidationError):
    """IP provided without a mask"""


class UserNetConflict(ValidationError):
    def __init__(self, member: str) -> None:
        super().__init__(f"User-mode networking excludes {member}")


class UserNetQueues(ValidationError):
    def __init__(self, queues: int) -> None:
        super().__init__(f"User-mode networking has 2 queues, not {queues}")


# What describes an interface of the host, which a device of user-mode networking does not have.
_NOT_WITH_USER = (
    "tap",
    "ip",
    "mask",
    "host_mac",
    "fds",
    "vhost_user",
    "vhost_socket",
    "rate_limiter_config",
)


def check_net(net: NetConfig, vm: VmConfig) -> None:
    """Raise the first rule that `net` breaks as a member of `vm`."""
    is_rate_limited = net.rate_limiter_config is not None
    if net.vhost_user:
        check_vhost_user(vm.memory, vhost_socket=net.vhost_socket, is_rate_limited=is_rate_limited)
    check_pci_device(net, vm)
    _check_queues(net, vm)
    if net.vhost_user and net.iommu:
        raise IommuNotSupported
    if net.mtu is not None and net.mtu < MINIMUM_MTU:
        raise InvalidMtu(net.mtu)
    if not net.offload_csum and (net.offload_tso or net.offload_ufo):
        raise NoHardwareChecksumOffload
    if net.mask is not None and net.ip is None:
        raise MaskProvidedWithoutIp
    if net.ip is not None and net.mask is None:
        raise IpProvidedWithoutMask
    if net.user is not None:
        _check_user(net, net.user)


def _check_user(net: NetConfig, user: UserNetConfig) -> None:
    for member in _NOT_WITH_USER:
        if getattr(net, member):
            raise UserNetConflict(member)
    if net.num_queues != USER_NET_QUEUES:
        raise UserNetQueues(net.num_queues)
    check_forwards(user.forwards)


def _check_queues(net: NetConfig, vm: VmConfig) -> None:
    if net.num_queues < 2:
        raise VnetQueueLowerThan2(net.num_queues)
    if net.fds is not None:
        _check_fds(net.fds, num_queues=net.num_queues)
    if net.num_queues // 2 > vm.cpus.boot_vcpus:
        raise TooManyQueues(net.num_queues, vm.cpus.boot_vcpus)
    check_queue_size(net.queue_size)


def _check_fds(fds: list[int], *, num_queues: int) -> None:
    if 2 * len(fds) != num_queues:
        raise VnetQueueFdMismatch(num_queues, 2 * len(fds))
    for fd in fds:
        if fd <= LAST_STANDARD_FD:
            raise VnetReservedFd(fd)
