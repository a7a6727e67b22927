"""Errors that a command answers with, from the outside in.

    ApiError                     the command's own kind: one per command, outermost in every answer
    ├── ApiPlumbingError         the channel itself failed
    │   ├── EventFdWrite, RequestSend, ResponseRecv, ResponsePayloadType
    │   └── CreateSeccompFilter, ApplySeccompFilter
    └── Vm…Error, VmmShutdownError   "The VM could not be paused"
    VmError                      what the VMM or the VM refused (the usual cause of an ApiError)
    MigratableError              pause, resume, snapshot and migration of the VM's parts

Texts are Cloud Hypervisor's (reference: rest.md section 9).
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class ApiError(VmmError):
    """Root of what a command answers with."""


class ApiPlumbingError(ApiError):
    """Root of what fails between the caller and the VMM thread."""


class EventFdWrite(ApiPlumbingError):
    """Cannot write to EventFd"""


class RequestSend(ApiPlumbingError):
    """API request send error"""


class ResponseRecv(ApiPlumbingError):
    """API response receive error"""


class ResponsePayloadType(ApiPlumbingError):
    """Wrong response payload type"""


class CreateSeccompFilter(ApiPlumbingError):
    """Cannot create seccomp filter"""


class ApplySeccompFilter(ApiPlumbingError):
    """Cannot apply seccomp filter"""


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


class VmmPingError(ApiError):
    """The VMM did not answer"""


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


class VmPowerButtonError(ApiError):
    """Error triggering power button"""


class VmNmiError(ApiError):
    """Error triggering NMI"""


class VmError(VmmError):
    """Root of what the VMM or the VM refuses."""


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


class VmmShuttingDown(VmError):
    """The VMM is shutting down"""


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
