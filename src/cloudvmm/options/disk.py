"""`--disk`."""

from __future__ import annotations

from cloudvmm.config.disk import DiskConfig, ImageType, LockGranularity, VirtQueueAffinity
from cloudvmm.options.rate_limit import LIMITER_KEYS, take_limiter
from cloudvmm.options.schema import PCI_KEYS_IOMMU, Key, Schema
from cloudvmm.options.value import (
    PATH,
    TEXT,
    TOGGLE,
    U16,
    U64,
    choice,
    parse_integer,
    parse_integer_list,
    tuple_list,
)

_IMAGE_TYPE = choice(
    {
        "vmdk": ImageType.FLAT_VMDK,
        "vhd": ImageType.FIXED_VHD,
        "qcow2": ImageType.QCOW2,
        "raw": ImageType.RAW,
        "vhdx": ImageType.VHDX,
    }
)
_LOCK_GRANULARITY = choice(
    {"byte-range": LockGranularity.BYTE_RANGE, "full": LockGranularity.FULL}, is_exact=True
)
_QUEUE_AFFINITY = tuple_list(
    lambda text: parse_integer(text, 0, 0xFFFF),
    lambda text: parse_integer_list(text, 64),
    syntax="[<queue>@[<host_cpus>]]",
)

DISK = Schema(
    "--disk",
    Key("path", PATH),
    Key("readonly", TOGGLE),
    Key("direct", TOGGLE),
    Key("queue_size", U16),
    Key("num_queues", U64),
    Key("vhost_user", TOGGLE),
    Key("socket", PATH, member="vhost_socket"),
    Key("_disable_io_uring", TOGGLE, member="disable_io_uring"),
    Key("_disable_aio", TOGGLE, member="disable_aio"),
    Key("rate_limit_group", TEXT),
    *LIMITER_KEYS,
    Key("serial", TEXT),
    Key("queue_affinity", _QUEUE_AFFINITY),
    Key("backing_files", TOGGLE),
    Key("image_type", _IMAGE_TYPE),
    Key("lock_granularity", _LOCK_GRANULARITY),
    Key("sparse", TOGGLE),
    *PCI_KEYS_IOMMU,
)


def parse_disk(text: str) -> DiskConfig:
    """Read `--disk`. With a vhost socket the image type is the back end's business, and dropped.

    :raises OptionError: when `text` is not what `--disk` takes.
    """
    members = DISK.members(text)
    limiter = take_limiter(members)
    if "vhost_socket" in members:
        members.pop("image_type", None)
    if "queue_affinity" in members:
        members["queue_affinity"] = [
            VirtQueueAffinity(queue_index=queue, host_cpus=host_cpus)
            for queue, host_cpus in members["queue_affinity"]
        ]
    return DiskConfig(rate_limiter_config=limiter, **members)
