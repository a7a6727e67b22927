"""The closed list of commands. Everything else that names commands is derived from `COMMANDS`.

A command is a small type: its name on the wire, what it is given, what it answers, which error it fails with,
and whether it reads (answered by the loop at once) or changes (carried out in order of arrival).
States: N nothing, C config only, A a VM object exists (reference: rest.md section 8).
"""

from __future__ import annotations

import enum
from typing import Any, ClassVar

from cloudvmm.api import error
from cloudvmm.api.channel import ReplyChannel
from cloudvmm.api.data import (
    ApiResponsePayload,
    Empty,
    VmActionPayload,
    VmForkResponse,
    VmInfo,
    VmMigrationProgress,
    VmmJobs,
    VmmPingResponse,
    VmSnapshotProgress,
)
from cloudvmm.config import device, operation
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.vm import VmConfig


class Effect(enum.Enum):
    READS = "reads"
    CHANGES = "changes"


class ApiRequest:
    """One command on its way to the VMM thread: `data` as the command wants it, `reply` for the answer."""

    __slots__ = ("data", "reply")

    name: ClassVar[str]
    body: ClassVar[type | None] = None
    answer: ClassVar[type[ApiResponsePayload]] = Empty
    error: ClassVar[type[error.ApiError]]
    effect: ClassVar[Effect] = Effect.CHANGES
    # The reference's D-Bus interface lacks two commands; clients that list its methods see the same here.
    is_on_dbus: ClassVar[bool] = True

    def __init__(self, data: Any, reply: ReplyChannel) -> None:
        self.data = data
        self.reply = reply

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"


class Stream:
    """What a client follows instead of asking once; not a command: the VMM thread has no part in it."""

    name: ClassVar[str]


class VmEvents(Stream):
    """Every event, as it happens, each with its number. Allowed always; an extension.

    REST: server-sent events. D-Bus: the `Event` signal.
    """

    name = "vm.events"


class VmmPing(ApiRequest):
    """Say who answers. Allowed always."""

    name = "vmm.ping"
    answer = VmmPingResponse
    error = error.VmmPingError
    effect = Effect.READS


class VmmShutdown(ApiRequest):
    """Delete the VM, if any, and end the VMM thread. Allowed always; overtakes what is under way."""

    name = "vmm.shutdown"
    error = error.VmmShutdownError


class VmInfoRequest(ApiRequest):
    """Tell config, state, memory and devices. Answers VmNotCreated in N."""

    name = "vm.info"
    answer = VmInfo
    error = error.VmInfoError
    effect = Effect.READS


class VmCountersRequest(ApiRequest):
    """Tell what the devices have moved. Needs A."""

    name = "vm.counters"
    answer = VmActionPayload
    error = error.VmInfoError
    effect = Effect.READS


class VmCreate(ApiRequest):
    """Store a config, without checking it, and open its consoles. Needs N."""

    name = "vm.create"
    body = VmConfig
    error = error.VmCreateError


class VmDelete(ApiRequest):
    """Forget the VM, shut down first. Allowed always; nothing to delete is success."""

    name = "vm.delete"
    error = error.VmDeleteError


class VmBoot(ApiRequest):
    """Check the config, build the VM, start it. Needs C."""

    name = "vm.boot"
    error = error.VmBootError


class VmPause(ApiRequest):
    """Freeze every vCPU. Needs A, Running."""

    name = "vm.pause"
    error = error.VmPauseError


class VmResume(ApiRequest):
    """Let every vCPU run again. Needs A, Paused."""

    name = "vm.resume"
    error = error.VmResumeError


class VmShutdown(ApiRequest):
    """Cut the power and keep the config. Needs A."""

    name = "vm.shutdown"
    error = error.VmShutdownError


class VmReboot(ApiRequest):
    """Destroy the VM and build it again from its current config. Needs A."""

    name = "vm.reboot"
    error = error.VmRebootError


class VmPowerButton(ApiRequest):
    """Press the ACPI power button; the guest decides. Needs A."""

    name = "vm.power-button"
    error = error.VmPowerButtonError


class VmNmi(ApiRequest):
    """Inject a non-maskable interrupt into every vCPU. Needs A."""

    name = "vm.nmi"
    error = error.VmNmiError
    is_on_dbus = False


class VmResize(ApiRequest):
    """Change vCPUs, RAM and balloon, in that order. Needs A; edits the config in C."""

    name = "vm.resize"
    body = operation.VmResizeData
    error = error.VmResizeError


class VmResizeDisk(ApiRequest):
    """Change the size of a disk image. Needs A."""

    name = "vm.resize-disk"
    body = operation.VmResizeDiskData
    error = error.VmResizeDiskError
    is_on_dbus = False


class VmResizeZone(ApiRequest):
    """Change the size of a memory zone. Needs A; edits the config in C."""

    name = "vm.resize-zone"
    body = operation.VmResizeZoneData
    error = error.VmResizeZoneError


class VmAddDevice(ApiRequest):
    """Add a VFIO device. Hot in A, config only in C."""

    name = "vm.add-device"
    body = device.DeviceConfig
    answer = VmActionPayload
    error = error.VmAddDeviceError


class VmAddUserDevice(ApiRequest):
    """Add a vfio-user device. Hot in A, config only in C."""

    name = "vm.add-user-device"
    body = device.UserDeviceConfig
    answer = VmActionPayload
    error = error.VmAddUserDeviceError


class VmAddDisk(ApiRequest):
    """Add a block device. Hot in A, config only in C."""

    name = "vm.add-disk"
    body = DiskConfig
    answer = VmActionPayload
    error = error.VmAddDiskError


class VmAddFs(ApiRequest):
    """Add a vhost-user file system. Hot in A, config only in C."""

    name = "vm.add-fs"
    body = device.FsConfig
    answer = VmActionPayload
    error = error.VmAddFsError


class VmAddGenericVhostUser(ApiRequest):
    """Add a vhost-user device of any type. Hot in A, config only in C."""

    name = "vm.add-generic-vhost-user"
    body = device.GenericVhostUserConfig
    answer = VmActionPayload
    error = error.VmAddGenericVhostUserError


class VmAddPmem(ApiRequest):
    """Add a persistent memory device. Hot in A, config only in C."""

    name = "vm.add-pmem"
    body = device.PmemConfig
    answer = VmActionPayload
    error = error.VmAddPmemError


class VmAddNet(ApiRequest):
    """Add a network device. Hot in A, config only in C."""

    name = "vm.add-net"
    body = NetConfig
    answer = VmActionPayload
    error = error.VmAddNetError


class VmAddVdpa(ApiRequest):
    """Add a vDPA device. Hot in A, config only in C."""

    name = "vm.add-vdpa"
    body = device.VdpaConfig
    answer = VmActionPayload
    error = error.VmAddVdpaError


class VmAddVsock(ApiRequest):
    """Add the vsock device; there can be one. Hot in A, config only in C."""

    name = "vm.add-vsock"
    body = device.VsockConfig
    answer = VmActionPayload
    error = error.VmAddVsockError


class VmRemoveDevice(ApiRequest):
    """Ask the guest to let go of a device in A; drop it from the config in C."""

    name = "vm.remove-device"
    body = operation.VmRemoveDeviceData
    error = error.VmRemoveDeviceError


class VmSnapshot(ApiRequest):
    """Write the whole VM to a folder. Needs A, Paused."""

    name = "vm.snapshot"
    body = operation.VmSnapshotConfig
    error = error.VmSnapshotError


class VmFork(ApiRequest):
    """Make clones of the VM, which goes on; each is held by a VMM of its own in this process. An extension.

    Needs A, Running or Paused. The disks that the guest can write go on in new images, and those until now
    are only read from then on.
    """

    name = "vm.fork"
    body = operation.VmForkData
    answer = VmForkResponse
    error = error.VmForkError
    is_on_dbus = False


class VmRestore(ApiRequest):
    """Make the VM that a snapshot holds. Needs N."""

    name = "vm.restore"
    body = operation.RestoreConfig
    error = error.VmRestoreError


class VmCoredump(ApiRequest):
    """Write the guest's memory as an ELF core file. Needs A, Running or Paused."""

    name = "vm.coredump"
    body = operation.VmCoredumpData
    error = error.VmCoredumpError


class VmReceiveMigration(ApiRequest):
    """Wait for a VM that another VMM sends. Needs N or C."""

    name = "vm.receive-migration"
    body = operation.VmReceiveMigrationData
    error = error.VmReceiveMigrationError


class VmSendMigration(ApiRequest):
    """Send the VM to another VMM. Needs A, Running or Paused."""

    name = "vm.send-migration"
    body = operation.VmSendMigrationData
    error = error.VmSendMigrationError


class VmSnapshotProgressRequest(ApiRequest):
    """Tell how far a snapshot is. Allowed always; an extension. Fails where there has been none."""

    name = "vm.snapshot-progress"
    answer = VmSnapshotProgress
    error = error.VmSnapshotProgressError
    effect = Effect.READS
    is_on_dbus = False


class VmCancelSnapshot(ApiRequest):
    """End the snapshot that is being taken; nothing of it stays, and the VM is as before. An extension.

    It is answered at once, and `vm.snapshot` fails soon. It fails where there is none, or where it is all but
    there.
    """

    name = "vm.cancel-snapshot"
    error = error.VmCancelSnapshotError
    is_on_dbus = False


class VmMigrationProgressRequest(ApiRequest):
    """Tell how far a migration is. Allowed always; an extension. Fails where there has been none."""

    name = "vm.migration-progress"
    answer = VmMigrationProgress
    error = error.VmMigrationProgressError
    effect = Effect.READS
    is_on_dbus = False


class VmCancelMigration(ApiRequest):
    """End the migration under way, outgoing or incoming; the VM stays where it is. An extension.

    It is answered at once, and events tell the outcome. It fails where there is none, or where the
    destination has been told to let the VM run.
    """

    name = "vm.cancel-migration"
    error = error.VmCancelMigrationError
    is_on_dbus = False


class VmmJobsRequest(ApiRequest):
    """Tell which commands are under way, which wait, and how far they are. Allowed always; an extension."""

    name = "vmm.jobs"
    answer = VmmJobs
    error = error.VmmJobsError
    effect = Effect.READS
    is_on_dbus = False


class VmmCancelJob(ApiRequest):
    """Call off a command that waits, or a snapshot or a migration that is under way. An extension.

    It is answered at once. Whoever asked for a command that waited gets an error, and nothing was done; what
    is under way ends soon. It fails where there is no such job, or where that cannot be called off any more.
    """

    name = "vmm.cancel-job"
    body = operation.VmmCancelJobData
    error = error.VmmCancelJobError
    is_on_dbus = False


COMMANDS: tuple[type[ApiRequest], ...] = (
    VmmPing,
    VmmShutdown,
    VmInfoRequest,
    VmCountersRequest,
    VmCreate,
    VmBoot,
    VmDelete,
    VmPause,
    VmResume,
    VmShutdown,
    VmReboot,
    VmPowerButton,
    VmNmi,
    VmResize,
    VmResizeDisk,
    VmResizeZone,
    VmAddDevice,
    VmAddUserDevice,
    VmAddDisk,
    VmAddFs,
    VmAddGenericVhostUser,
    VmAddNet,
    VmAddPmem,
    VmAddVdpa,
    VmAddVsock,
    VmRemoveDevice,
    VmSnapshot,
    VmFork,
    VmRestore,
    VmCoredump,
    VmReceiveMigration,
    VmSendMigration,
    VmMigrationProgressRequest,
    VmCancelMigration,
    VmSnapshotProgressRequest,
    VmCancelSnapshot,
    VmmJobsRequest,
    VmmCancelJob,
)


STREAMS: tuple[type[Stream], ...] = (VmEvents,)


class VmAction(enum.Enum):
    """One variant per action on the VM; the value is the command."""

    BOOT = VmBoot
    DELETE = VmDelete
    PAUSE = VmPause
    RESUME = VmResume
    SHUTDOWN = VmShutdown
    REBOOT = VmReboot
    POWER_BUTTON = VmPowerButton
    NMI = VmNmi
    COUNTERS = VmCountersRequest
    RESIZE = VmResize
    RESIZE_DISK = VmResizeDisk
    RESIZE_ZONE = VmResizeZone
    ADD_DEVICE = VmAddDevice
    ADD_USER_DEVICE = VmAddUserDevice
    ADD_DISK = VmAddDisk
    ADD_FS = VmAddFs
    ADD_GENERIC_VHOST_USER = VmAddGenericVhostUser
    ADD_NET = VmAddNet
    ADD_PMEM = VmAddPmem
    ADD_VDPA = VmAddVdpa
    ADD_VSOCK = VmAddVsock
    REMOVE_DEVICE = VmRemoveDevice
    SNAPSHOT = VmSnapshot
    FORK = VmFork
    RESTORE = VmRestore
    COREDUMP = VmCoredump
    RECEIVE_MIGRATION = VmReceiveMigration
    SEND_MIGRATION = VmSendMigration
    MIGRATION_PROGRESS = VmMigrationProgressRequest
    CANCEL_MIGRATION = VmCancelMigration
    SNAPSHOT_PROGRESS = VmSnapshotProgressRequest
    CANCEL_SNAPSHOT = VmCancelSnapshot
