"""Network devices of a VM."""

from __future__ import annotations

import enum

from cloudvmm.config.number import U16, U32
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.rate_limit import RateLimiterConfig


class VhostMode(enum.Enum):
    CLIENT = "Client"
    SERVER = "Server"


class NetConfig(PciDevice, kw_only=True):
    """`num_queues` counts receive and transmit queues, so one pair is 2.

    `fds` are open TAP descriptors, one per queue pair. They belong to the VMM from the moment the
    configuration is handed over; from JSON they are never honoured.
    """

    tap: str | None = None
    ip: str | None = None
    mask: str | None = None
    mac: str | None = None
    host_mac: str | None = None
    mtu: U16 | None = None
    num_queues: U32 = 2
    queue_size: U16 = 256
    vhost_user: bool = False
    vhost_socket: str | None = None
    vhost_mode: VhostMode = VhostMode.CLIENT
    fds: list[int] | None = None
    rate_limiter_config: RateLimiterConfig | None = None
    offload_tso: bool = True
    offload_ufo: bool = True
    offload_csum: bool = True
