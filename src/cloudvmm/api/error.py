"""Errors that a command answers with, from the outside in.

    ApiError                     the command's own kind: one per command, outermost in every answer
    ├── ApiPlumbingError         the channel itself failed
    │   ├── EventFdWrite, RequestSend, ResponseRecv, ResponsePayloadType
    │   └── CreateSeccompFilter, ApplySeccompFilter
    └── Vm…Error, VmmShutdownError   "The VM could not be paused"
    VmError                      what the VMM or the VM refused (the usual cause of an ApiError)
    MigratableError              pause, resume, snapshot and migration of the VM's parts

Texts are Cloud Hypervisor's (reference: rest.md section 9). Those that a server needs before its first answer
are in `plumbing.py`, and here too.
"""

from __future__ import annotations

from cloudvmm.api.plumbing import ApiError as ApiError
from cloudvmm.api.plumbing import ApiPlumbingError as ApiPlumbingError
from cloudvmm.api.plumbing import ApplySeccompFilter as ApplySeccompFilter
from cloudvmm.api.plumbing import CreateSeccompFilter as CreateSeccompFilter
from cloudvmm.api.plumbing import EventFdWrite as EventFdWrite
from cloudvmm.api.plumbing import RequestSend as RequestSend
from cloudvmm.api.plumbing import ResponsePayloadType as ResponsePayloadType
from cloudvmm.api.plumbing import ResponseRecv as ResponseRecv
from cloudvmm.api.plumbing import VmError as VmError
from cloudvmm.api.plumbing import VmmPingError as VmmPingError
from cloudvmm.api.plumbing import VmmShuttingDown as VmmShuttingDown
from cloudvmm.errors import VmmError


class VmCreateError(ApiError):
    """The VM could not be created"""


class VmBootError(ApiError):
    """The VM could not boot"""


class VmDeleteError(ApiError):
    """The VM could not be deleted"""


class VmInfoError(ApiError):
    """The VM info is not available"""


class VmPauseError(ApiError):
    """The VM could not be paused"""


class VmResumeError(ApiError):
    """The VM could not resume"""


class VmShutdownError(ApiError):
    """The VM could not shutdown"""


class VmRebootError(ApiError):
    """The VM could not reboot"""


class VmSnapshotError(ApiError):
    """The VM could not be snapshotted"""


class VmForkError(ApiError):
    """The VM could not be forked"""


class VmRestoreError(ApiError):
    """The VM could not be restored"""


class VmCoredumpError(ApiError):
    """The VM could not be coredumped"""


class VmmShutdownError(ApiError):
    """The VMM could not shutdown"""


class VmResizeError(ApiError):
    """The VM could not be resized"""


class VmResizeDiskError(ApiError):
    """The disk could not be resized"""


class VmResizeZoneError(ApiError):
    """The memory zone could not be resized"""


class VmAddDeviceError(ApiError):
    """The device could not be added to the VM"""


class VmAddUserDeviceError(ApiError):
    """The user device could not be added to the VM"""


class VmRemoveDeviceError(ApiError):
    """The device could not be removed from the VM"""


class VmAddDiskError(ApiError):
    """The disk could not be added to the VM"""


class VmAddFsError(ApiError):
    """The fs could not be added to the VM"""


class VmAddGenericVhostUserError(ApiError):
    """The generic vhost-user device could not be added to the VM"""


class VmAddPmemError(ApiError):
    """The pmem device could not be added to the VM"""


class VmAddNetError(ApiError):
    """The network device could not be added to the VM"""


class VmAddVdpaError(ApiError):
    """The vDPA device could not be added to the VM"""


class VmAddVsockError(ApiError):
    """The vsock device could not be added to the VM"""


class VmReceiveMigrationError(ApiError):
    """Error receiving migration"""


class VmSendMigrationError(ApiError):
    """Error dispatching the migration worker"""


class VmSnapshotProgressError(ApiError):
    """Error looking at the snapshot"""


class VmCancelSnapshotError(ApiError):
    """Error cancelling the snapshot"""


class VmMigrationProgressError(ApiError):
    """Error looking at the migration"""


class VmCancelMigrationError(ApiError):
    """Error cancelling the migration"""


class VmmJobsError(ApiError):
    """Error looking at the jobs"""


class VmmCancelJobError(ApiError):
    """Error cancelling the job"""


class VmPowerButtonError(ApiError):
    """Error triggering power button"""


class VmNmiError(ApiError):
    """Error triggering NMI"""


class VmMissingConfig(VmError):
    """VM config is missing"""


class VmNotCreated(VmError):
    """VM is not created"""


class VmNotBooted(VmError):
    """VM is not booted"""


class VmAlreadyCreated(VmError):
    """VM is already created"""


class VmNotRunning(VmError):
    """VM is not running"""


class VmMigrating(VmError):
    """VM is currently migrating and can't be modified"""


class VmRestoring(VmError):
    """VM on-demand memory restore is still in progress"""


class InvalidStateTransition(VmError):
    """`before` and `after` are state words."""

    def __init__(self, before: str, after: str) -> None:
        super().__init__(f"invalid VM state transition: {before} to {after}")
        self.before = before
        self.after = after


class NoSuchVmm(VmError):
    """`vmm_id` is what it was called."""

    def __init__(self, vmm_id: str) -> None:
        super().__init__(f"There is no VMM called {vmm_id}")
        self.vmm_id = vmm_id


class VmmExists(VmError):
    """`vmm_id` is taken, perhaps by one that is about to end."""

    def __init__(self, vmm_id: str) -> None:
        super().__init__(f"There is a VMM called {vmm_id} already")
        self.vmm_id = vmm_id


class InvalidVmmId(VmError):
    """It becomes the name of files, so it is of few letters."""

    def __init__(self, vmm_id: str) -> None:
        super().__init__(
            f"{vmm_id[:80]!r} cannot be the name of a VMM: it is of 1 to 64 letters, digits and . _ - "
            "and begins with a letter or a digit"
        )
        self.vmm_id = vmm_id


class TooManyVmms(VmError):
    """`most` is how many there may be."""

    def __init__(self, most: int) -> None:
        super().__init__(f"There are {most} VMMs already, and there may be no more")
        self.most = most


class NoSuchJob(VmError):
    """It has ended, or there never was one of that number."""

    def __init__(self, job_id: int) -> None:
        super().__init__(f"There is no job {job_id}")
        self.job_id = job_id


class JobNotCancellable(VmError):
    """`command` is what the job is called."""

    def __init__(self, command: str) -> None:
        super().__init__(f"A job of this kind or at this point cannot be cancelled: {command}")
        self.command = command


class JobCancelled(VmError):
    """The job was cancelled before its turn, and has done nothing"""


class ConfigValidation(VmError):
    """Failed to validate config"""


class VmPauseFailed(VmError):
    """Cannot pause VM"""


class VmResumeFailed(VmError):
    """Cannot resume VM"""


class VmSnapshotFailed(VmError):
    """Cannot snapshot VM"""


class VmSnapshotSendFailed(VmError):
    """Cannot send VM snapshot"""


class VmForkFailed(VmError):
    """Cannot fork VM"""


class VmRestoreFailed(VmError):
    """Cannot restore VM"""


class InvalidRestoreSourceUrl(VmError):
    """Invalid restore source URL"""


class TooManyVsockDevices(VmError):
    """Too many virtio-vsock devices"""


class NoDeviceToRemove(VmError):
    def __init__(self, device_id: str) -> None:
        super().__init__(f'No device with id "{device_id}" to remove')


class ResizeZone(VmError):
    """Failed resizing a memory zone"""


class ResizeDisk(VmError):
    """Failed resizing a disk image"""


class DeviceManager(VmError):
    """Error from device manager"""


class UnknownDeviceId(VmError):
    """The cause of a `DeviceManager` that becomes HTTP 404."""

    def __init__(self, device_id: str) -> None:
        super().__init__(f"Failed to find device corresponding to the given identifier: {device_id}")


class CpuManager(VmError):
    """Error from CPU manager"""


class VcpuRemovalPending(VmError):
    """Still pending removed vCPU"""


class MemoryManager(VmError):
    """Memory manager error"""


class CreateConsoleDevices(VmError):
    """Error creating console devices"""


class LockingError(VmError):
    """Error locking disk images: Another instance likely holds a lock"""


class ErrorNmi(VmError):
    """Error injecting NMI"""


class PowerButton(VmError):
    """Error triggering power button"""


class Coredump(VmError):
    """Error coredumping VM"""


class ApplyMemoryZoneUpdate(VmError):
    """Error applying memory zone updates"""


class ApplyLandlock(VmError):
    """Failed to apply landlock config during vm_create"""


class CreateVm(VmError):
    """Cannot create the VM"""


class VmShutdownFailed(VmError):
    """Cannot shut down the VM"""


class KernelLoad(VmError):
    """Cannot load the kernel into memory"""


class NotImplementedYet(VmError):
    """The command is part of the API, but this release has no means for it (docs/compatibility.md)"""


class MigratableError(VmmError):
    """Root of what pause, resume, snapshot and migration of the VM's parts answer."""


class MigratablePause(MigratableError):
    """Failed to pause migratable component"""


class MigratableResume(MigratableError):
    """Failed to resume migratable component"""


class MigratableSnapshot(MigratableError):
    """Failed to snapshot migratable component"""


class MigratableSend(MigratableError):
    """Failed to send migratable component snapshot"""


class InvalidTransition(MigratableError):
    """How a forbidden pause or resume reads inside the chain."""

    def __init__(self, before: str, after: str) -> None:
        super().__init__(f"Invalid transition: InvalidStateTransition({before}, {after})")


class MigratableRestore(MigratableError):
    """Failed to restore migratable component"""


class MigratableReceive(MigratableError):
    """Failed to receive migratable component snapshot"""


class MigratableSocket(MigratableError):
    """Socket error"""


class CompleteMigration(MigratableError):
    """Failed to complete migration for migratable component"""


class SnapshotOfRunningVm(MigratableError):
    """Trying to snapshot while VM is running"""


class UrlWithoutPath(MigratableError):
    def __init__(self, url: str) -> None:
        super().__init__(f"Could not extract path from URL: {url}")


class NotASnapshotDirectory(MigratableError):
    """`path` is printed quoted."""

    def __init__(self, path: str) -> None:
        super().__init__(f"Destination is not a directory: {path}")


class AlreadyMigrating(MigratableError):
    """There is already an ongoing migration"""


class ReceiveOverVm(MigratableError):
    """Can't receive a migration when a VM is already created"""


class NoVmToMigrate(MigratableError):
    """VM is not running"""


class NotMigratable(MigratableError):
    """`state` is a state word."""

    def __init__(self, state: str) -> None:
        super().__init__(f"VM is not running or paused: {state}")


class LocalNeedsSharedMemory(MigratableError):
    """Local migration requires shared memory or hugepages enabled"""


class NoSnapshot(MigratableError):
    """No snapshot is being taken"""


class SnapshotCompletes(MigratableError):
    """The snapshot is all but there and cannot be cancelled any more"""


class SnapshotCancelled(MigratableError):
    """The snapshot was cancelled"""


class NoMigration(MigratableError):
    """There is no migration"""


class MigrationCompletes(MigratableError):
    """The destination was told to let the VM run, so the migration cannot be cancelled any more"""


class InvalidSendMigration(MigratableError):
    """Invalid send migration configuration"""


class InvalidReceiveMigration(MigratableError):
    """Invalid receive migration configuration"""


class MigrationAborted(MigratableError):
    """Migration was aborted"""
