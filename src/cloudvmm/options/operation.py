"""`--restore`, and what the remote's restore, send-migration and receive-migration take."""

from __future__ import annotations

from typing import Any

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
    TEXT,
    TOGGLE,
    U32,
    U64,
    choice,
    parse_integer,
    parse_u64,
    truncate,
    truncated_integer_list,
    tuple_list,
)

_FDS = truncated_integer_list(32, is_signed=True).parse
_NET_FDS = tuple_list(str, _FDS, syntax="[<id>@[<fd>,<fd>]]")
_VFIO_FDS = tuple_list(str, parse_u64, syntax="[<id>@<fd>]")
_ZONE_UPDATES = tuple_list(
    str, lambda text: parse_integer(text, 0, 0xFFFF_FFFF), syntax="[<id>@<host_numa_node>]"
)
_MEMORY_MODE = choice({"precopy": MigrationMemoryMode.PRECOPY, "postcopy": MigrationMemoryMode.POSTCOPY})

RESTORE = Schema(
    "--restore",
    Key("source_url", TEXT, missing="source_url missing"),
    Key("prefault", TOGGLE),
    Key(
        "memory_restore_mode",
        choice({"copy": MemoryRestoreMode.COPY, "ondemand": MemoryRestoreMode.ON_DEMAND}),
    ),
    Key("net_fds", _NET_FDS),
    Key("vfio_fds", _VFIO_FDS),
    Key("iommufd_fd", I32),
    Key("resume", TOGGLE),
    Key("zone_updates", _ZONE_UPDATES),
)

RECEIVE_MIGRATION = Schema(
    "receive migration parameters",
    Key("receiver_url", TEXT, missing_cause=lambda: InvalidSyntax("receiver_url is required")),
    Key("tls_dir", PATH),
    Key("memory_mode", _MEMORY_MODE),
    Key("vfio_fds", _VFIO_FDS),
    Key("iommufd_fd", I32),
    Key("zone_updates", _ZONE_UPDATES),
)

SEND_MIGRATION = Schema(
    "send migration parameters",
    Key("destination_url", TEXT, missing_cause=lambda: InvalidSyntax("destination_url is required")),
    Key("local", TOGGLE),
    Key("preserve_source", TOGGLE),
    Key("downtime_ms", U64),
    Key("timeout_s", U64),
    Key("timeout_strategy", choice({"cancel": TimeoutStrategy.CANCEL, "ignore": TimeoutStrategy.IGNORE})),
    Key("connections", U32),
    Key("tls_dir", PATH),
    Key("memory_mode", _MEMORY_MODE),
)


def parse_restore(text: str) -> RestoreConfig:
    """Read `--restore`; descriptors are this process's own.

    :raises OptionError: when `text` is not what `--restore` takes.
    """
    members = RESTORE.members(text)
    if "net_fds" in members:
        members["net_fds"] = [
            RestoredNetConfig(id=net_id, num_fds=len(fds), fds=fds) for net_id, fds in members["net_fds"]
        ]
    _restore_types(members)
    return RestoreConfig(**members)


def parse_receive_migration(text: str) -> VmReceiveMigrationData:
    """Read the grammar only; the rules of a migration are checked where it is carried out.

    :raises OptionError: when `text` does not parse.
    """
    members = RECEIVE_MIGRATION.members(text)
    _restore_types(members)
    return VmReceiveMigrationData(**members)


def parse_send_migration(text: str) -> VmSendMigrationData:
    """Read the grammar only; the rules of a migration are checked where it is carried out.

    :raises OptionError: when `text` does not parse.
    """
    members = SEND_MIGRATION.members(text)
    for key in ("downtime_ms", "timeout_s", "connections"):
        if members.get(key) == 0:
            raise ParseError(SEND_MIGRATION.what) from InvalidValue(f"{key} must be non-zero")
    return VmSendMigrationData(**members)


def _restore_types(members: dict[str, Any]) -> None:
    if "vfio_fds" in members:
        members["vfio_fds"] = [
            RestoredVfioConfig(id=device_id, fd=truncate(fd, 32)) for device_id, fd in members["vfio_fds"]
        ]
    if "zone_updates" in members:
        members["zone_updates"] = [
            MemoryZoneUpdate(id=zone_id, host_numa_node=node) for zone_id, node in members["zone_updates"]
        ]
