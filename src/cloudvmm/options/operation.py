"""`--restore`, and what the remote's restore, send-migration and receive-migration take."""

from __future__ import annotations

from cloudvmm.config.operation import (
    MemoryRestoreMode,
    MemoryZoneUpdate,
    MigrationMemoryMode,
    RestoreConfig,
    RestoredNetConfig,
    RestoredVfioConfig,
    TimeoutStrategy,
    VmReceiveMigrationData,
    VmSendMigrationData,
)
from cloudvmm.options.error import InvalidSyntax, InvalidValue, ParseError
from cloudvmm.options.schema import Key, Schema
from cloudvmm.options.value import (
    I32,
    PATH,
    STRING_LIST,
    TEXT,
    TOGGLE,
    TUPLE_KEY,
    U32,
    U64,
    bare_truncated,
    bare_unsigned,
    choice,
    truncated_integer_list,
    tuple_list,
)

_NET_FDS = tuple_list(
    TUPLE_KEY,
    truncated_integer_list(32, is_signed=True),
    make=lambda net_id, fds: RestoredNetConfig(id=net_id, num_fds=len(fds), fds=fds),
    split=lambda net: (net.id, net.fds or []),
    syntax="[<id>@[<fd>,<fd>]]",
)
_VFIO_FDS = tuple_list(
    TUPLE_KEY,
    bare_truncated(32, is_signed=True),
    make=lambda device_id, fd: RestoredVfioConfig(id=device_id, fd=fd),
    split=lambda device: (device.id, -1 if device.fd is None else device.fd),
    syntax="[<id>@<fd>]",
)
_ZONE_UPDATES = tuple_list(
    TUPLE_KEY,
    bare_unsigned(32),
    make=lambda zone_id, node: MemoryZoneUpdate(id=zone_id, host_numa_node=node),
    split=lambda update: (update.id, update.host_numa_node),
    syntax="[<id>@<host_numa_node>]",
)
_REPLACEMENTS = (
    Key("vfio_fds", _VFIO_FDS, "New descriptors for VFIO devices; needs iommufd_fd"),
    Key("iommufd_fd", I32, "New iommufd"),
)
_ZONES = Key("zone_updates", _ZONE_UPDATES, "Other NUMA nodes of the host for memory zones")
_MEMORY_MODE = Key(
    "memory_mode",
    choice({"precopy": MigrationMemoryMode.PRECOPY, "postcopy": MigrationMemoryMode.POSTCOPY}),
    "Whether memory is sent before the guest moves, or also after it",
)

RESTORE = Schema(
    "--restore",
    RestoreConfig,
    Key("source_url", TEXT, "Where the snapshot lies: file://<folder>", missing="source_url missing"),
    Key("prefault", TOGGLE, "Whether to read all memory before the guest goes on"),
    Key(
        "memory_restore_mode",
        choice({"copy": MemoryRestoreMode.COPY, "ondemand": MemoryRestoreMode.ON_DEMAND}),
        "Whether memory is read at once, or when the guest touches it",
    ),
    Key("net_fds", _NET_FDS, "New descriptors for network devices that had some"),
    *_REPLACEMENTS,
    Key("resume", TOGGLE, "Whether the guest goes on at once"),
    _ZONES,
)

RECEIVE_MIGRATION = Schema(
    "receive migration parameters",
    VmReceiveMigrationData,
    Key(
        "receiver_url",
        TEXT,
        "Where to listen: tcp:<host>:<port> or unix:<path>",
        missing_cause=lambda: InvalidSyntax("receiver_url is required"),
    ),
    Key("tls_dir", PATH, "Folder with the certificates of an encrypted migration"),
    _MEMORY_MODE,
    *_REPLACEMENTS,
    _ZONES,
    Key("net_fds", _NET_FDS, "New descriptors for network devices that had some; beyond the reference"),
)

SEND_MIGRATION = Schema(
    "send migration parameters",
    VmSendMigrationData,
    Key(
        "destination_url",
        TEXT,
        "Where the receiver listens: tcp:<host>:<port> or unix:<path>",
        missing_cause=lambda: InvalidSyntax("destination_url is required"),
    ),
    Key("local", TOGGLE, "Whether to hand over memory instead of copying it; same host only"),
    Key("preserve_source", TOGGLE, "Whether the VM stays here, paused; with local only"),
    Key("downtime_ms", U64, "Milliseconds that the guest may stand still"),
    Key("timeout_s", U64, "Seconds after which timeout_strategy decides"),
    Key(
        "timeout_strategy",
        choice({"cancel": TimeoutStrategy.CANCEL, "ignore": TimeoutStrategy.IGNORE}),
        "Whether to give up at the timeout, or to go on with a longer standstill",
    ),
    Key("connections", U32, "Connections side by side, 1 to 128"),
    Key("tls_dir", PATH, "Folder with the certificates of an encrypted migration"),
    _MEMORY_MODE,
    Key("copy_disks", STRING_LIST, "Disks that are copied there, by their ids; beyond the reference"),
)


def parse_restore(text: str) -> RestoreConfig:
    """Read `--restore`; descriptors are this process's own.

    :raises OptionError: when `text` is not what `--restore` takes.
    """
    return RestoreConfig(**RESTORE.members(text))


def parse_receive_migration(text: str) -> VmReceiveMigrationData:
    """Read the grammar only; the rules of a migration are checked where it is carried out.

    :raises OptionError: when `text` does not parse.
    """
    return VmReceiveMigrationData(**RECEIVE_MIGRATION.members(text))


def parse_send_migration(text: str) -> VmSendMigrationData:
    """Read the grammar only; the rules of a migration are checked where it is carried out.

    :raises OptionError: when `text` does not parse.
    """
    members = SEND_MIGRATION.members(text)
    for key in ("downtime_ms", "timeout_s", "connections"):
        if members.get(key) == 0:
            raise ParseError(SEND_MIGRATION.what) from InvalidValue(f"{key} must be non-zero")
    return VmSendMigrationData(**members)


def format_restore(restore: RestoreConfig) -> str:
    """:raises Unprintable: no `--restore` gives `restore`."""
    return RESTORE.format(restore, parse_restore)


def format_receive_migration(data: VmReceiveMigrationData) -> str:
    """:raises Unprintable: no string gives `data`."""
    return RECEIVE_MIGRATION.format(data, parse_receive_migration)


def format_send_migration(data: VmSendMigrationData) -> str:
    """:raises Unprintable: no string gives `data`."""
    return SEND_MIGRATION.format(data, parse_send_migration)
