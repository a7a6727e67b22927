"""Network devices: virtio-net on TAP queues that are open already."""

from __future__ import annotations

from typing import Final

from cloudvmm.config.net import NetConfig
from cloudvmm.engine.qemu.name import part_id, qdev_id
from cloudvmm.engine.qemu.parts import Parts, Properties
from cloudvmm.engine.qemu.slot import place

# What QEMU accepts: receive rings of 256 to 1024, and with a TAP no transmit ring but one of 256.
_MIN_RING: Final = 256
_MAX_RING: Final = 1024

_CHECKSUM: Final = ("csum", "guest_csum")
_SEGMENTATION: Final = ("host_tso4", "host_tso6", "host_ecn", "guest_tso4", "guest_tso6", "guest_ecn")
_FRAGMENTATION: Final = ("host_ufo", "guest_ufo")


def net_parts(slots: dict[str, int], net: NetConfig, *, net_id: str, fds: list[int]) -> Parts:
    """Describe `net`; `fds` are its TAP queues."""
    backend = part_id(net_id, "net")
    netdev: Properties = {"type": "tap", "id": backend, "vhost": False, "fds": fds}
    device: Properties = {
        "driver": "virtio-net-pci",
        "id": qdev_id(net_id),
        **place(slots, net_id),
        "disable-legacy": "on",
        "netdev": backend,
        "romfile": "",
        "rx_queue_size": max(_MIN_RING, min(net.queue_size, _MAX_RING)),
        **_offloads(net),
    }
    if net.mac is not None:
        device["mac"] = net.mac
    if net.mtu is not None:
        device["host_mtu"] = net.mtu
    if len(fds) > 1:
        # One vector for each queue, one for the control queue and one for changes of the configuration.
        device |= {"mq": True, "vectors": 2 * len(fds) + 2}
    return Parts(netdevs=[netdev], devices=[device])


def _offloads(net: NetConfig) -> Properties:
    return {
        **dict.fromkeys(_CHECKSUM, net.offload_csum),
        **dict.fromkeys(_SEGMENTATION, net.offload_tso),
        **dict.fromkeys(_FRAGMENTATION, net.offload_ufo),
    }
