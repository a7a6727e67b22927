"""What commands answer with."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from cloudvmm.api.ping import Pong
from cloudvmm.config.vm import VmConfig

VmCounters = dict[str, dict[str, int]]


class VmState(enum.Enum):
    CREATED = "Created"
    RUNNING = "Running"
    SHUTDOWN = "Shutdown"
    PAUSED = "Paused"
    BREAK_POINT = "BreakPoint"


class VmmPingResponse(msgspec.Struct, frozen=True, kw_only=True):
    build_version: str
    version: str
    pid: int
    features: list[str]


class PciBarResource(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    base: int
    size: int
    type_: Literal["Io", "Mmio32", "Mmio64"]
    prefetchable: bool


class AddressRange(msgspec.Struct, frozen=True, kw_only=True):
    base: int
    size: int


Resource = dict[str, PciBarResource | AddressRange | int | str]


class DeviceNode(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`resources` and `children` are always written; `parent` and `pci_bdf` only where they are set."""

    id: str
    resources: list[Resource]
    parent: str | None = None
    children: list[str]
    pci_bdf: str | None = None


DeviceTree = dict[str, DeviceNode]


class VmInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`device_tree` is there only while a VM object exists; `memory_actual_size` is bytes."""

    config: VmConfig
    state: VmState
    memory_actual_size: int
    device_tree: DeviceTree | None = None


class PciDeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    bdf: str


class Empty(msgspec.Struct, frozen=True):
    """Done, and nothing to say."""


class VmActionPayload(msgspec.Struct, frozen=True):
    """JSON bytes that an action on the VM answered with, if any."""

    body: bytes | None = None


class MigrationRole(enum.Enum):
    """Whether the VM leaves or comes."""

    SENDER = "Sender"
    RECEIVER = "Receiver"


class MigrationPhase(enum.Enum):
    """A sender is Connecting, Sending, Loading (the other side puts the VM together) and Completing.

    A receiver is Listening, Preparing, Receiving, Loading and Completing. Either is Postcopy then, where the
    guest has gone on before all of its memory is there.
    """

    LISTENING = "Listening"
    CONNECTING = "Connecting"
    PREPARING = "Preparing"
    SENDING = "Sending"
    RECEIVING = "Receiving"
    LOADING = "Loading"
    COMPLETING = "Completing"
    POSTCOPY = "Postcopy"
    FINISHED = "Finished"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class VmMigrationProgress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The migration under way, or the last one. What is not known is not there.

    `iteration` counts the passes over the guest's memory from 0. `downtime_ms` is how long the guest stood
    still, known where it has come to an end.
    """

    role: MigrationRole
    phase: MigrationPhase
    elapsed_ms: int
    transferred_bytes: int
    iteration: int | None = None
    remaining_bytes: int | None = None
    dirty_bytes_per_s: int | None = None
    expected_downtime_ms: int | None = None
    downtime_ms: float | None = None


class SnapshotPhase(enum.Enum):
    """Saving, while the engine writes, and Completing, while the files get their names."""

    SAVING = "Saving"
    COMPLETING = "Completing"
    FINISHED = "Finished"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


class VmSnapshotProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The snapshot that is being taken, or the last one.

    `saved_bytes` of `total_bytes` are done with, memory that the guest never used included.
    """

    phase: SnapshotPhase
    elapsed_ms: int
    saved_bytes: int
    total_bytes: int


class ForkedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A clone, which a VMM of its own holds at `api_socket`; what is made for it is in `directory`."""

    id: str
    api_socket: str
    directory: str


class VmForkResponse(msgspec.Struct, frozen=True, kw_only=True):
    """`pause_ms` is how long the guest stood still. `disks` are the images that it goes on in, by disk id."""

    clones: list[ForkedVm]
    pause_ms: float
    disks: dict[str, str]


class JobState(enum.Enum):
    """One job is Running and others are Queued behind it; an outgoing migration is Running beside these."""

    QUEUED = "Queued"
    RUNNING = "Running"


class VmmJob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A command that waits or is under way; `id` is of no other one of this VMM.

    `since` is when that began, in seconds of UTC since 1970, and `elapsed_ms` how long it is by now. What is
    not known is not there: `done_bytes` of `total_bytes`, which make `percent`. A migration's total grows
    with what the guest writes meanwhile. `can_cancel` tells whether `vmm.cancel-job` would end it now.
    """

    id: int
    command: str
    state: JobState
    since: float
    elapsed_ms: int
    can_cancel: bool
    done_bytes: int | None = None
    total_bytes: int | None = None
    percent: float | None = None


class VmmJobs(msgspec.Struct, frozen=True, kw_only=True):
    """In the order in which they began, then those that wait, in the order in which they are to begin."""

    jobs: list[VmmJob]


class HeldState(enum.Enum):
    """Starting; Running, which takes commands; Ending; Failed, whose error is told."""

    STARTING = "Starting"
    RUNNING = "Running"
    ENDING = "Ending"
    FAILED = "Failed"


class HeldVmm(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A VMM that a daemon holds; any client of Cloud Hypervisor's API can use it at `api_socket`.

    `vm_state` is the state of its VM, if it has one and tells so in time; `error` is why it failed, outermost
    first.
    """

    id: str
    api_socket: str
    state: HeldState
    vm_state: VmState | None = None
    error: list[str] | None = None


class HeldVmms(msgspec.Struct, frozen=True, kw_only=True):
    """In the order in which they were made."""

    vmms: list[HeldVmm]


class HeldJob(VmmJob, frozen=True, kw_only=True, omit_defaults=True):
    """A job of the VMM called `vmm`, by which, with its `id`, it is called off."""

    vmm: str


class HeldJobs(msgspec.Struct, frozen=True, kw_only=True):
    """In the order of the VMMs. One that does not tell in time is not here, but in `silent`."""

    jobs: list[HeldJob]
    silent: list[str]


class DaemonPingResponse(msgspec.Struct, frozen=True, kw_only=True):
    """It holds `vmms` VMMs and may hold `max_vmms`."""

    build_version: str
    pid: int
    vmms: int
    max_vmms: int


ApiResponsePayload = (
    Empty
    | VmInfo
    | VmmPingResponse
    | Pong
    | VmActionPayload
    | VmMigrationProgress
    | VmSnapshotProgress
    | VmForkResponse
    | VmmJobs
    | DaemonPingResponse
    | HeldVmm
    | HeldVmms
    | HeldJobs
)
