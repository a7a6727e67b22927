"""The commands as methods, by blocking. Who carries them out, over a socket or in process, is the subclass.

Every method raises what `call` raises, and blocks until the answer is there.
"""

from __future__ import annotations

import abc
import time
from typing import TYPE_CHECKING, TypeVar

from cloudvmm.client import table
from cloudvmm.client.error import ClientError, ConnectionFailed, NoAnswer
from cloudvmm.client.failure import NotFound, ServerFull
from cloudvmm.client.follow import Patience, Removal, Resizing, is_running, may_be_well_later

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
    from cloudvmm.client.stream import EventStream
    from cloudvmm.client.table import Command
    from cloudvmm.config.device import (
        DeviceConfig,
        FsConfig,
        GenericVhostUserConfig,
        PmemConfig,
        UserDeviceConfig,
        VdpaConfig,
        VsockConfig,
    )
    from cloudvmm.config.disk import DiskConfig
    from cloudvmm.config.net import NetConfig
    from cloudvmm.config.operation import (
        RestoreConfig,
        VmCoredumpData,
        VmForkData,
        VmmCancelJobData,
        VmReceiveMigrationData,
        VmRemoveDeviceData,
        VmResizeData,
        VmResizeDiskData,
        VmResizeZoneData,
        VmSendMigrationData,
        VmSnapshotConfig,
    )
    from cloudvmm.config.vm import VmConfig
    from cloudvmm.events.hub import Event

T = TypeVar("T")


class Methods(abc.ABC):
    """One method per command, named like the functions of `cloudvmm.api`."""

    @abc.abstractmethod
    def call(self, command: Command[T], data: object = None, *, timeout_s: float | None = None) -> T:
        """Carry out any of `table.COMMANDS`; `timeout_s` replaces the client's own limit.

        :raises ServerError: the server refused, or the command failed; its causes say why.
        :raises ClientError: there is no answer; `may_have_run` tells what that means.
        :raises ValueError: `data` is nothing that a command takes, or does not fit its descriptors.
        """

    @abc.abstractmethod
    def events(self, from_number: int | None = None) -> EventStream:
        """Follow events: from number `from_number` on, or those that come from now on.

        :raises NotSupported: the server has no event stream.
        :raises ClientError: as for `call`.
        """

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return as soon as the server answers.

        :raises TimeoutError: it has not in time; the cause is what was the matter last.
        """
        patience = Patience(timeout_s, "The server does not answer")
        while True:
            try:
                self.call(table.VMM_PING, timeout_s=patience.question_s)
                return
            except (ConnectionFailed, NoAnswer, ServerFull) as error:
                pause_s = patience.pause_s(error)
            time.sleep(pause_s)

    def wait_until_running(self, timeout_s: float) -> VmInfo:
        """Return as soon as the VM runs, with what `vm_info` then says.

        Another client may create and boot it. Asks again and again, so that it works with every server.

        :raises TimeoutError: it does not run in time; the text has the last state seen, if any.
        """
        patience = Patience(timeout_s, "The VM does not run")
        while True:
            try:
                info = self.call(table.VM_INFO, timeout_s=patience.question_s)
                if is_running(info):
                    return info
                patience.last_state = info.state.value
                pause_s = patience.pause_s()
            except ClientError as error:
                if not may_be_well_later(error):
                    raise
                pause_s = patience.pause_s(error)
            time.sleep(pause_s)

    def wait_for_event(
        self, source: str, event: str, timeout_s: float, *, from_number: int | None = None
    ) -> Event:
        """Return the next event of this source and name: from now on, or from `from_number` on.

        What happens between a command and this call is missed. Open `events` before the command, and let
        it wait, where that matters.

        :raises TimeoutError: there was none in time.
        :raises NotSupported: the server has no event stream.
        """
        with self.events(from_number) as stream:
            return stream.wait_for(source, event, timeout_s)

    def remove_device(self, device_id: str, wait_s: float) -> None:
        """Ask the guest to let go of a device, and return once it has, or the VM is gone or made anew.

        `vm_remove_device` alone returns before the guest has heard of it. A device of a VM that is not booted
        goes at once. One that the guest keeps has left the config all the same, and the guest may still let
        go of it; whoever asks again asks it again.

        :raises TimeoutError: the guest has not in `wait_s`, counted from the answer; the text says if it is
            paused.
        :raises RemovalRefused: it said that it does not.
        :raises NotSupported: the server has no event stream; nothing was asked.
        :raises ServerError: there is no such device, or it cannot be removed.
        :raises ClientError: as for `call`, or events were lost.
        """
        from cloudvmm.config.operation import VmRemoveDeviceData

        removal = Removal(device_id, wait_s)
        with self.events() as stream:
            self.call(table.VM_REMOVE_DEVICE, VmRemoveDeviceData(id=device_id))
            if removal.is_gone(self.call(table.VM_INFO)):
                return
            try:
                stream.wait_until(removal.is_end, wait_s)
            except TimeoutError as error:
                if not removal.is_gone(self.call(table.VM_INFO)):
                    raise removal.complaint() from error

    def resize(self, data: VmResizeData, wait_s: float) -> None:
        """Change vCPUs, RAM and balloon; return once the guest has followed, or the VM is gone or made anew.

        `vm_resize` alone returns before the guest has. Sizes of a VM that is not booted are set at once. Less
        RAM than it has is for the next boot where modules are the method, and not waited for. A guest that is
        too slow or does not follow may still do so, and the sizes are in the config all the same.

        :raises TimeoutError: the guest has not in `wait_s`, counted from the answer; the text says what it
            has, what was asked for, and when it made its last step.
        :raises ResizeRefused: it said that it does not.
        :raises NotSupported: the server has no event stream; nothing was asked.
        :raises ServerError: a size cannot be; those before it were asked for.
        :raises ClientError: as for `call`, or events were lost.
        """
        self._resize(table.VM_RESIZE, data, Resizing.of(data, wait_s), wait_s)

    def resize_zone(self, data: VmResizeZoneData, wait_s: float) -> None:
        """Change the size of a memory zone, and return once the guest has followed: as `resize`."""
        self._resize(table.VM_RESIZE_ZONE, data, Resizing.of_zone(data, wait_s), wait_s)

    def _resize(self, command: Command[None], data: object, resizing: Resizing, wait_s: float) -> None:
        with self.events() as stream:
            self.call(command, data)
            try:
                if resizing.needs_no_guest(self.call(table.VM_INFO)):
                    return
            except NotFound:
                return  # the VM was quicker gone
            try:
                stream.wait_until(resizing.is_end, wait_s)
            except TimeoutError as error:
                raise resizing.complaint() from error

    def vmm_ping(self) -> VmmPingResponse:
        """Say who answers: version, process id, features."""
        return self.call(table.VMM_PING)

    def vmm_shutdown(self) -> None:
        """Delete the VM, if any, and end the server."""
        self.call(table.VMM_SHUTDOWN)

    def vm_info(self) -> VmInfo:
        """Tell config, state, memory and devices.

        Descriptors in the config are `form.INVALID_FD`, one for each that the server holds.
        """
        return self.call(table.VM_INFO)

    def vm_counters(self) -> VmCounters:
        """Tell what each device has moved: device id to counter name to value."""
        return self.call(table.VM_COUNTERS)

    def vm_create(self, vm_config: VmConfig) -> None:
        """Store a config, unchecked, and open its consoles. It holds no descriptors: see `vm_add_net`."""
        self.call(table.VM_CREATE, vm_config)

    def vm_boot(self) -> None:
        """Check the config, build the VM, start it."""
        self.call(table.VM_BOOT)

    def vm_delete(self) -> None:
        """Forget the VM, shut down first; nothing to delete is success."""
        self.call(table.VM_DELETE)

    def vm_pause(self) -> None:
        """Freeze every vCPU."""
        self.call(table.VM_PAUSE)

    def vm_resume(self) -> None:
        """Let every vCPU run again."""
        self.call(table.VM_RESUME)

    def vm_shutdown(self) -> None:
        """Cut the power and keep the config."""
        self.call(table.VM_SHUTDOWN)

    def vm_reboot(self) -> None:
        """Destroy the VM and build it again from its current config."""
        self.call(table.VM_REBOOT)

    def vm_power_button(self) -> None:
        """Press the ACPI power button; the guest decides."""
        self.call(table.VM_POWER_BUTTON)

    def vm_nmi(self) -> None:
        """Inject a non-maskable interrupt into every vCPU."""
        self.call(table.VM_NMI)

    def vm_resize(self, data: VmResizeData) -> None:
        """Change vCPUs, RAM and balloon, in that order; sizes are bytes."""
        self.call(table.VM_RESIZE, data)

    def vm_resize_disk(self, data: VmResizeDiskData) -> None:
        """Change the size of a disk image; bytes."""
        self.call(table.VM_RESIZE_DISK, data)

    def vm_resize_zone(self, data: VmResizeZoneData) -> None:
        """Change the size of a memory zone; bytes."""
        self.call(table.VM_RESIZE_ZONE, data)

    def vm_add_device(self, device_config: DeviceConfig) -> PciDeviceInfo | None:
        """Add a VFIO device; None before the VM is booted. `device_config.fd` is passed and stays yours."""
        return self.call(table.VM_ADD_DEVICE, device_config)

    def vm_add_user_device(self, user_device_config: UserDeviceConfig) -> PciDeviceInfo | None:
        """Add a vfio-user device; None before the VM is booted."""
        return self.call(table.VM_ADD_USER_DEVICE, user_device_config)

    def vm_add_disk(self, disk_config: DiskConfig) -> PciDeviceInfo | None:
        """Add a block device; None before the VM is booted."""
        return self.call(table.VM_ADD_DISK, disk_config)

    def vm_add_fs(self, fs_config: FsConfig) -> PciDeviceInfo | None:
        """Add a vhost-user file system; None before the VM is booted."""
        return self.call(table.VM_ADD_FS, fs_config)

    def vm_add_generic_vhost_user(
        self, generic_vhost_user_config: GenericVhostUserConfig
    ) -> PciDeviceInfo | None:
        """Add a vhost-user device of any type; None before the VM is booted."""
        return self.call(table.VM_ADD_GENERIC_VHOST_USER, generic_vhost_user_config)

    def vm_add_net(self, net_config: NetConfig) -> PciDeviceInfo | None:
        """Add a network device; None before the VM is booted. `net_config.fds` are passed and stay yours."""
        return self.call(table.VM_ADD_NET, net_config)

    def vm_add_pmem(self, pmem_config: PmemConfig) -> PciDeviceInfo | None:
        """Add a persistent memory device; None before the VM is booted."""
        return self.call(table.VM_ADD_PMEM, pmem_config)

    def vm_add_vdpa(self, vdpa_config: VdpaConfig) -> PciDeviceInfo | None:
        """Add a vDPA device; None before the VM is booted."""
        return self.call(table.VM_ADD_VDPA, vdpa_config)

    def vm_add_vsock(self, vsock_config: VsockConfig) -> PciDeviceInfo | None:
        """Add the vsock device; None before the VM is booted."""
        return self.call(table.VM_ADD_VSOCK, vsock_config)

    def vm_remove_device(self, data: VmRemoveDeviceData) -> None:
        """Ask the guest to let go of a device; event `device-removed` tells that it has: `remove_device`."""
        self.call(table.VM_REMOVE_DEVICE, data)

    def vm_snapshot(self, data: VmSnapshotConfig) -> None:
        """Write the whole paused VM to a folder."""
        self.call(table.VM_SNAPSHOT, data)

    def vm_fork(self, data: VmForkData) -> VmForkResponse:
        """Make clones of the VM, which goes on; each has a server of its own, at the socket that is told."""
        return self.call(table.VM_FORK, data)

    def vm_restore(self, data: RestoreConfig) -> None:
        """Make the VM that a snapshot holds. Descriptors in `data` are passed and stay yours."""
        self.call(table.VM_RESTORE, data)

    def vm_coredump(self, data: VmCoredumpData) -> None:
        """Write the guest's memory as an ELF core file."""
        self.call(table.VM_COREDUMP, data)

    def vm_receive_migration(self, data: VmReceiveMigrationData) -> None:
        """Wait for a VM that another VMM sends. Descriptors in `data` are passed and stay yours."""
        self.call(table.VM_RECEIVE_MIGRATION, data)

    def vm_send_migration(self, data: VmSendMigrationData) -> None:
        """Send the VM to another VMM."""
        self.call(table.VM_SEND_MIGRATION, data)

    def vm_migration_progress(self) -> VmMigrationProgress:
        """Tell how far the migration under way is, or how the last one ended."""
        return self.call(table.VM_MIGRATION_PROGRESS)

    def vm_cancel_migration(self) -> None:
        """Call off the migration under way; events tell of its end."""
        self.call(table.VM_CANCEL_MIGRATION)

    def vm_snapshot_progress(self) -> VmSnapshotProgress:
        """Tell how far the snapshot that is being taken is, or how the last one ended."""
        return self.call(table.VM_SNAPSHOT_PROGRESS)

    def vm_cancel_snapshot(self) -> None:
        """Call off the snapshot that is being taken: whoever asked for it gets an error."""
        self.call(table.VM_CANCEL_SNAPSHOT)

    def vmm_jobs(self) -> VmmJobs:
        """Tell which commands are under way and which wait, and how far they are."""
        return self.call(table.VMM_JOBS)

    def vmm_cancel_job(self, data: VmmCancelJobData) -> None:
        """Call a command off that waits, or a snapshot or a migration: whoever asked for it gets an error."""
        self.call(table.VMM_CANCEL_JOB, data)
