"""The commands as a client sees them: how each is asked for, and what it answers with.

`cloudvmm.api.COMMANDS` is the list that counts; a test compares. This copy holds what a client needs and
nothing that costs time to import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from cloudvmm.api.data import (
        PciDeviceInfo,
        VmCounters,
        VmForkResponse,
        VmInfo,
        VmMigrationProgress,
        VmmJobs,
        VmmPingResponse,
        VmSnapshotProgress,
    )

T = TypeVar("T")

AnswerKind = Literal[
    "nothing",
    "ping",
    "info",
    "counters",
    "migration-progress",
    "snapshot-progress",
    "device",
    "fork",
    "jobs",
]
_CHANGING = ("nothing", "device", "fork")


class Command(Generic[T]):
    """`name` is the one on the wire. One that `is_long` may take as long as the guest's memory is large."""

    __slots__ = ("answer", "is_long", "method", "name")

    def __init__(self, name: str, answer: AnswerKind = "nothing", *, is_long: bool = False) -> None:
        self.name = name
        self.answer = answer
        self.method = "PUT" if answer in _CHANGING else "GET"
        self.is_long = is_long

    def __repr__(self) -> str:
        return f"Command({self.name})"


VMM_PING: Command[VmmPingResponse] = Command("vmm.ping", "ping")
VMM_SHUTDOWN: Command[None] = Command("vmm.shutdown")
VM_INFO: Command[VmInfo] = Command("vm.info", "info")
VM_COUNTERS: Command[VmCounters] = Command("vm.counters", "counters")
VM_CREATE: Command[None] = Command("vm.create")
VM_BOOT: Command[None] = Command("vm.boot", is_long=True)
VM_DELETE: Command[None] = Command("vm.delete")
VM_PAUSE: Command[None] = Command("vm.pause")
VM_RESUME: Command[None] = Command("vm.resume")
VM_SHUTDOWN: Command[None] = Command("vm.shutdown")
VM_REBOOT: Command[None] = Command("vm.reboot", is_long=True)
VM_POWER_BUTTON: Command[None] = Command("vm.power-button")
VM_NMI: Command[None] = Command("vm.nmi")
VM_RESIZE: Command[None] = Command("vm.resize", is_long=True)
VM_RESIZE_DISK: Command[None] = Command("vm.resize-disk")
VM_RESIZE_ZONE: Command[None] = Command("vm.resize-zone", is_long=True)
VM_ADD_DEVICE: Command[PciDeviceInfo | None] = Command("vm.add-device", "device")
VM_ADD_USER_DEVICE: Command[PciDeviceInfo | None] = Command("vm.add-user-device", "device")
VM_ADD_DISK: Command[PciDeviceInfo | None] = Command("vm.add-disk", "device")
VM_ADD_FS: Command[PciDeviceInfo | None] = Command("vm.add-fs", "device")
VM_ADD_GENERIC_VHOST_USER: Command[PciDeviceInfo | None] = Command("vm.add-generic-vhost-user", "device")
VM_ADD_NET: Command[PciDeviceInfo | None] = Command("vm.add-net", "device")
VM_ADD_PMEM: Command[PciDeviceInfo | None] = Command("vm.add-pmem", "device")
VM_ADD_VDPA: Command[PciDeviceInfo | None] = Command("vm.add-vdpa", "device")
VM_ADD_VSOCK: Command[PciDeviceInfo | None] = Command("vm.add-vsock", "device")
VM_REMOVE_DEVICE: Command[None] = Command("vm.remove-device")
VM_SNAPSHOT: Command[None] = Command("vm.snapshot", is_long=True)
VM_FORK: Command[VmForkResponse] = Command("vm.fork", "fork", is_long=True)
VM_RESTORE: Command[None] = Command("vm.restore", is_long=True)
VM_COREDUMP: Command[None] = Command("vm.coredump", is_long=True)
VM_RECEIVE_MIGRATION: Command[None] = Command("vm.receive-migration", is_long=True)
VM_SEND_MIGRATION: Command[None] = Command("vm.send-migration", is_long=True)
VM_MIGRATION_PROGRESS: Command[VmMigrationProgress] = Command("vm.migration-progress", "migration-progress")
VM_CANCEL_MIGRATION: Command[None] = Command("vm.cancel-migration")
VM_SNAPSHOT_PROGRESS: Command[VmSnapshotProgress] = Command("vm.snapshot-progress", "snapshot-progress")
VM_CANCEL_SNAPSHOT: Command[None] = Command("vm.cancel-snapshot")
VMM_JOBS: Command[VmmJobs] = Command("vmm.jobs", "jobs")
VMM_CANCEL_JOB: Command[None] = Command("vmm.cancel-job")

COMMANDS: tuple[Command[Any], ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Command)
)
"""In the order of `cloudvmm.api.COMMANDS`."""

EVENTS = "vm.events"
