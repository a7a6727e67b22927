"""`--disk`."""

from __future__ import annotations

from cloudvmm.config.disk import DiskConfig, ImageType, LockGranularity, VirtQueueAffinity
from cloudvmm.options.rate_limit import LIMITER_KEYS, limiter_members, take_limiter
from cloudvmm.options.schema import PCI_KEYS_IOMMU, Key, Schema
from cloudvmm.options.value import PATH, TEXT, TOGGLE, U16, U64, choice, integer_list, tuple_list

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
    U16,
    integer_list(64),
    make=lambda queue, host_cpus: VirtQueueAffinity(queue_index=queue, host_cpus=host_cpus),
    split=lambda affinity: (affinity.queue_index, affinity.host_cpus),
    syntax="[<queue>@[<host_cpus>]]",
)

DISK = Schema(
    "--disk",
    DiskConfig,
    Key("path", PATH, "Disk image or block device"),
    Key("readonly", TOGGLE, "Whether the guest may only read"),
    Key("direct", TOGGLE, "Whether to bypass the host's page cache (O_DIRECT)"),
    Key("queue_size", U16, "Size of each queue, a power of two"),
    Key("num_queues", U64, "Number of queues, no more than vCPUs at boot"),
    Key("vhost_user", TOGGLE, "Whether a vhost-user back end serves the disk"),
    Key("socket", PATH, "UNIX socket of the vhost-user back end", member="vhost_socket"),
    Key("_disable_io_uring", TOGGLE, "Do without io_uring; for tests", member="disable_io_uring"),
    Key("_disable_aio", TOGGLE, "Do without Linux AIO; for tests", member="disable_aio"),
    Key("rate_limit_group", TEXT, "Identifier of the group whose limits hold"),
    *LIMITER_KEYS,
    Key("serial", TEXT, "Serial number that the guest sees; 20 bytes at most"),
    Key("queue_affinity", _QUEUE_AFFINITY, "Host CPUs that the thread of each queue may run on"),
    Key("backing_files", TOGGLE, "Whether a qcow2 image may refer to other files"),
    Key("image_type", _IMAGE_TYPE, "Form of the image; found out if not given"),
    Key("lock_granularity", _LOCK_GRANULARITY, "What of the image is locked: its present size, or all"),
    Key("sparse", TOGGLE, "Whether the guest can give space back (discard, write zeroes)"),
    *PCI_KEYS_IOMMU,
)
_KEYS_BESIDE_SOCKET = tuple(key for key in DISK.keys if key.name != "image_type")


def parse_disk(text: str) -> DiskConfig:
    """Read `--disk`. With a vhost socket the image type is the back end's business, and not looked at.

    :raises OptionError: when `text` is not what `--disk` takes.
    """
    options = DISK.parse(text)
    has_socket = options.get("socket") is not None
    members = DISK.convert(options, _KEYS_BESIDE_SOCKET if has_socket else DISK.keys)
    return DiskConfig(rate_limiter_config=take_limiter(members), **members)


def format_disk(disk: DiskConfig) -> str:
    """:raises Unprintable: no `--disk` gives `disk`."""
    image_type = None if disk.image_type is ImageType.UNKNOWN else disk.image_type
    return DISK.format(disk, parse_disk, image_type=image_type, **limiter_members(disk.rate_limiter_config))
