"""`--net`."""

from __future__ import annotations

from cloudvmm.config.net import NetConfig, VhostMode
from cloudvmm.options.rate_limit import LIMITER_KEYS, take_limiter
from cloudvmm.options.schema import PCI_KEYS_IOMMU, Key, Schema
from cloudvmm.options.value import (
    IP,
    MAC,
    PATH,
    TEXT,
    TOGGLE,
    U16,
    U64,
    choice,
    truncated_integer_list,
)

NET = Schema(
    "--net",
    Key("tap", TEXT),
    Key("ip", IP),
    Key("mask", IP),
    Key("mac", MAC),
    Key("host_mac", MAC),
    Key("offload_tso", TOGGLE),
    Key("offload_ufo", TOGGLE),
    Key("offload_csum", TOGGLE),
    Key("mtu", U16),
    Key("queue_size", U16),
    Key("num_queues", U64),
    Key("vhost_user", TOGGLE),
    Key("socket", PATH, member="vhost_socket"),
    Key("vhost_mode", choice({"client": VhostMode.CLIENT, "server": VhostMode.SERVER})),
    Key("fd", truncated_integer_list(32, is_signed=True), member="fds"),
    *LIMITER_KEYS,
    *PCI_KEYS_IOMMU,
)


def parse_net(text: str) -> NetConfig:
    """Read `--net`; the descriptors in `fd` are this process's own, inherited.

    :raises OptionError: when `text` is not what `--net` takes.
    """
    members = NET.members(text)
    limiter = take_limiter(members)
    return NetConfig(rate_limiter_config=limiter, **members)
