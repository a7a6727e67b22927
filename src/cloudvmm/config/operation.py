"""What the commands on a VM are given: resize, remove, snapshot, restore, migration.

Shapes only (reference: rest.md section 7). The rules of `RestoreConfig` are in `config/restore.py`.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec

from cloudvmm.config.number import I32, U32, U64

NonZeroU64 = Annotated[int, msgspec.Meta(ge=1)]
NonZeroU32 = Annotated[int, msgspec.Meta(ge=1, le=0xFFFF_FFFF)]


class VmResizeData(msgspec.Struct, kw_only=True):
    """Sizes are bytes; a member that is None is left as it is."""

    desired_vcpus: U32 | None = None
    desired_ram: U64 | None = None
    desired_balloon: U64 | None = None


class VmResizeDiskData(msgspec.Struct, kw_only=True):
    """`desired_size` is bytes."""

    id: str
    desired_size: U64


class VmResizeZoneData(msgspec.Struct, kw_only=True):
    """`desired_ram` is bytes."""

    id: str
    desired_ram: U64


class VmRemoveDeviceData(msgspec.Struct, kw_only=True):
    id: str


class VmmCancelJobData(msgspec.Struct, kw_only=True):
    id: U64


class VmSnapshotConfig(msgspec.Struct, kw_only=True):
    """`overlay_directory` is beyond the reference, and left out where it is unset."""

    destination_url: str
    overlay_directory: str | msgspec.UnsetType = msgspec.UNSET


class CloneConfig(msgspec.Struct, kw_only=True):
    """What one clone of a fork has otherwise than the others: see `config/fork.py`."""

    id: str | None = None
    api_socket: str | None = None
    overrides: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class VmForkData(msgspec.Struct, kw_only=True):
    """`count` clones, or those of `clones`; all beyond the reference."""

    directory: str
    count: NonZeroU32 | None = None
    clones: list[CloneConfig] | None = None
    resume: bool = True


class VmCoredumpData(msgspec.Struct, kw_only=True):
    destination_url: str


class MemoryRestoreMode(enum.Enum):
    COPY = "Copy"
    ON_DEMAND = "OnDemand"


class RestoredNetConfig(msgspec.Struct, kw_only=True):
    """New TAP descriptors for one network device; `fds` belong to the VMM once handed over."""

    id: str
    num_fds: U64 = 0
    fds: list[I32] | None = None


class RestoredVfioConfig(msgspec.Struct, kw_only=True):
    """A new VFIO descriptor for one device; `fd` belongs to the VMM once handed over."""

    id: str
    fd: I32 | None = None


class MemoryZoneUpdate(msgspec.Struct, kw_only=True):
    id: str
    host_numa_node: U32


class RestoreConfig(msgspec.Struct, kw_only=True):
    """`overrides` and `overlay_directory` are beyond the reference, and left out where they are unset.

    The former are what `config/override.py` says.
    """

    source_url: str
    prefault: bool = False
    memory_restore_mode: MemoryRestoreMode = MemoryRestoreMode.COPY
    net_fds: list[RestoredNetConfig] | None = None
    vfio_fds: list[RestoredVfioConfig] | None = None
    iommufd_fd: I32 | None = None
    resume: bool = False
    zone_updates: list[MemoryZoneUpdate] = msgspec.field(default_factory=list)
    overrides: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    overlay_directory: str | msgspec.UnsetType = msgspec.UNSET


class MigrationMemoryMode(enum.Enum):
    PRECOPY = "Precopy"
    POSTCOPY = "Postcopy"


class TimeoutStrategy(enum.Enum):
    CANCEL = "Cancel"
    IGNORE = "Ignore"


class VmReceiveMigrationData(msgspec.Struct, kw_only=True):
    """`overrides` and `net_fds` are beyond the reference, as those of a restore; left out where unset."""

    receiver_url: str
    tls_dir: str | None = None
    memory_mode: MigrationMemoryMode = MigrationMemoryMode.PRECOPY
    vfio_fds: list[RestoredVfioConfig] | None = None
    iommufd_fd: I32 | None = None
    zone_updates: list[MemoryZoneUpdate] = msgspec.field(default_factory=list)
    overrides: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    net_fds: list[RestoredNetConfig] | msgspec.UnsetType = msgspec.UNSET


class VmSendMigrationData(msgspec.Struct, kw_only=True):
    """`copy_disks` is beyond the reference, and left out where it is unset: ids of disks that go along."""

    destination_url: str
    local: bool = False
    preserve_source: bool = False
    downtime_ms: NonZeroU64 = 300
    timeout_s: NonZeroU64 = 3600
    timeout_strategy: TimeoutStrategy = TimeoutStrategy.CANCEL
    connections: NonZeroU32 = 1
    tls_dir: str | None = None
    memory_mode: MigrationMemoryMode = MigrationMemoryMode.PRECOPY
    copy_disks: list[str] | msgspec.UnsetType = msgspec.UNSET
