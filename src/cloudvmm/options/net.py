"""`--net`."""

from __future__ import annotations

from cloudvmm.config.net import NetConfig, VhostMode
from cloudvmm.config.user_net import UserNetConfig
from cloudvmm.options.error import OptionError
from cloudvmm.options.rate_limit import LIMITER_KEYS, limiter_members, take_limiter
from cloudvmm.options.schema import PCI_KEYS_IOMMU, Key, Schema
from cloudvmm.options.value import (
    IP,
    MAC,
    PATH,
    STRING_LIST,
    TEXT,
    TOGGLE,
    U16,
    U64,
    choice,
    truncated_integer_list,
)

NET = Schema(
    "--net",
    NetConfig,
    Key("tap", TEXT, "TAP interface on the host; made if it is not there"),
    Key("ip", IP, "Address of the interface on the host"),
    Key("mask", IP, "Network mask of that address"),
    Key("mac", MAC, "MAC address of the guest; made up if not given"),
    Key("host_mac", MAC, "MAC address of the interface on the host"),
    Key("offload_tso", TOGGLE, "Whether the guest may leave TCP segmentation to the host"),
    Key("offload_ufo", TOGGLE, "Whether the guest may leave UDP fragmentation to the host"),
    Key("offload_csum", TOGGLE, "Whether the guest may leave checksums to the host"),
    Key("mtu", U16, "Bytes in a packet at most, 1280 or more"),
    Key("queue_size", U16, "Size of each queue, a power of two"),
    Key("num_queues", U64, "Number of queues, receive and transmit together"),
    Key("vhost_user", TOGGLE, "Whether a vhost-user back end serves the device"),
    Key("socket", PATH, "UNIX socket of the vhost-user back end", member="vhost_socket"),
    Key(
        "vhost_mode",
        choice({"client": VhostMode.CLIENT, "server": VhostMode.SERVER}),
        "Whether to connect to that socket, or to wait there for the back end",
    ),
    Key(
        "fd",
        truncated_integer_list(32, is_signed=True),
        "Open TAP devices, one for each pair of queues, inherited by this process",
        member="fds",
    ),
    *LIMITER_KEYS,
    *PCI_KEYS_IOMMU,
    Key("user", TOGGLE, "Whether to use user-mode networking, which needs no rights on the host"),
    Key(
        "forward",
        STRING_LIST,
        "Ports of the host that lead to the guest, each <tcp|udp>:<address>:<port>:<guest port>; "
        "only with user=on",
        member="forwards",
    ),
)


class ForwardWithoutUser(OptionError):
    """Error parsing --net: forward needs user=on"""


def parse_net(text: str) -> NetConfig:
    """Read `--net`; the descriptors in `fd` are this process's own, inherited.

    :raises OptionError: when `text` is not what `--net` takes.
    """
    members = NET.members(text)
    limiter = take_limiter(members)
    is_user = members.pop("user", False)
    forwards = members.pop("forwards", None)
    if forwards is not None and not is_user:
        raise ForwardWithoutUser
    user = UserNetConfig(forwards=forwards or []) if is_user else None
    return NetConfig(rate_limiter_config=limiter, user=user, **members)


def format_net(net: NetConfig) -> str:
    """:raises Unprintable: no `--net` gives `net`."""
    members = limiter_members(net.rate_limiter_config)
    if net.user is not None:
        members |= {"user": True, "forwards": net.user.forwards or None}
    return NET.format(net, parse_net, **members)
