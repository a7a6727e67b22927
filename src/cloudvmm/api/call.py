"""One function per command: send it to the VMM thread and wait for its answer.

Each takes the API eventfd, the sender, and the command's data where it has some. All block until the VMM
thread has answered; any thread may call them. All raise `ApiError`: the command's own kind when the command
failed, `RequestSend` or `EventFdWrite` when the VMM thread has ended.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from cloudvmm.api import action
from cloudvmm.api.channel import ApiSender, ReplyChannel
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
from cloudvmm.api.error import EventFdWrite, ResponsePayloadType
from cloudvmm.config import device, operation
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.host.eventfd import EventFd

P = TypeVar(
    "P",
    Empty,
    VmInfo,
    VmmPingResponse,
    VmActionPayload,
    VmMigrationProgress,
    VmSnapshotProgress,
    VmForkResponse,
    VmmJobs,
)


def send_request(
    api_evt: EventFd, api_sender: ApiSender, command: type[action.ApiRequest], data: Any = None
) -> ApiResponsePayload:
    """Send `command` with `data` and wait for its answer.

    :raises ApiError: the command failed, or the VMM thread has ended.
    """
    reply = ReplyChannel()
    api_sender.send(command(data, reply))
    try:
        api_evt.write()
    except OSError as failure:
        raise EventFdWrite from failure
    return reply.recv()


def _expect(
    kind: type[P], api_evt: EventFd, api_sender: ApiSender, command: type[action.ApiRequest], data: Any = None
) -> P:
    payload = send_request(api_evt, api_sender, command, data)
    if not isinstance(payload, kind):
        raise ResponsePayloadType
    return payload


def vmm_ping(api_evt: EventFd, api_sender: ApiSender) -> VmmPingResponse:
    return _expect(VmmPingResponse, api_evt, api_sender, action.VmmPing)


def vmm_shutdown(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmmShutdown)


def vm_info(api_evt: EventFd, api_sender: ApiSender) -> VmInfo:
    return _expect(VmInfo, api_evt, api_sender, action.VmInfoRequest)


def vm_counters(api_evt: EventFd, api_sender: ApiSender) -> bytes | None:
    """Return JSON: device id to counter name to value."""
    return _expect(VmActionPayload, api_evt, api_sender, action.VmCountersRequest).body


def vm_create(api_evt: EventFd, api_sender: ApiSender, vm_config: VmConfig) -> None:
    """Descriptors inside `vm_config` belong to the VMM once it has the request, also when it refuses.

    The VMM gets a copy of all else.

    :raises RequestSend: the VMM thread has ended; descriptors are still the caller's.
    """
    _expect(Empty, api_evt, api_sender, action.VmCreate, copy.deepcopy(vm_config))


def vm_boot(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmBoot)


def vm_delete(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmDelete)


def vm_pause(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmPause)


def vm_resume(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmResume)


def vm_shutdown(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmShutdown)


def vm_reboot(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmReboot)


def vm_power_button(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmPowerButton)


def vm_nmi(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmNmi)


def vm_resize(api_evt: EventFd, api_sender: ApiSender, data: operation.VmResizeData) -> None:
    _expect(Empty, api_evt, api_sender, action.VmResize, data)


def vm_resize_disk(api_evt: EventFd, api_sender: ApiSender, data: operation.VmResizeDiskData) -> None:
    _expect(Empty, api_evt, api_sender, action.VmResizeDisk, data)


def vm_resize_zone(api_evt: EventFd, api_sender: ApiSender, data: operation.VmResizeZoneData) -> None:
    _expect(Empty, api_evt, api_sender, action.VmResizeZone, data)


def vm_remove_device(api_evt: EventFd, api_sender: ApiSender, data: operation.VmRemoveDeviceData) -> None:
    _expect(Empty, api_evt, api_sender, action.VmRemoveDevice, data)


def vm_snapshot(api_evt: EventFd, api_sender: ApiSender, data: operation.VmSnapshotConfig) -> None:
    _expect(Empty, api_evt, api_sender, action.VmSnapshot, data)


def vm_fork(api_evt: EventFd, api_sender: ApiSender, data: operation.VmForkData) -> VmForkResponse:
    return _expect(VmForkResponse, api_evt, api_sender, action.VmFork, data)


def vm_restore(api_evt: EventFd, api_sender: ApiSender, data: operation.RestoreConfig) -> None:
    _expect(Empty, api_evt, api_sender, action.VmRestore, data)


def vm_coredump(api_evt: EventFd, api_sender: ApiSender, data: operation.VmCoredumpData) -> None:
    _expect(Empty, api_evt, api_sender, action.VmCoredump, data)


def vm_receive_migration(
    api_evt: EventFd, api_sender: ApiSender, data: operation.VmReceiveMigrationData
) -> None:
    _expect(Empty, api_evt, api_sender, action.VmReceiveMigration, data)


def vm_send_migration(api_evt: EventFd, api_sender: ApiSender, data: operation.VmSendMigrationData) -> None:
    _expect(Empty, api_evt, api_sender, action.VmSendMigration, data)


def vm_add_device(
    api_evt: EventFd, api_sender: ApiSender, device_config: device.DeviceConfig
) -> bytes | None:
    """Return JSON of a `PciDeviceInfo` after a hot add, None after a cold one."""
    return _expect(VmActionPayload, api_evt, api_sender, action.VmAddDevice, device_config).body


def vm_add_user_device(
    api_evt: EventFd, api_sender: ApiSender, user_device_config: device.UserDeviceConfig
) -> bytes | None:
    """Return JSON of a `PciDeviceInfo` after a hot add, None after a cold one."""
    return _expect(VmActionPayload, api_evt, api_sender, action.VmAddUserDevice, user_device_config).body


def vm_add_disk(api_evt: EventFd, api_sender: ApiSender, disk_config: DiskConfig) -> bytes | None:
    """Return JSON of a `PciDeviceInfo` after a hot add, None after a cold one."""
    return _expect(VmActionPayload, api_evt, api_sender, action.VmAddDisk, disk_config).body


def vm_add_fs(api_evt: EventFd, api_sender: ApiSender, fs_config: device.FsConfig) -> bytes | None:
    """Return JSON of a `PciDeviceInfo` after a hot add, None after a cold one."""
    return _expect(VmActionPayload, api_evt, api_sender, action.VmAddFs, fs_config).body


def vm_add_generic_vhost_user(
    api_evt: EventFd, api_sender: ApiSender, generic_vhost_user_config: device.GenericVhostUserConfig
) -> bytes | None:
    """Return JSON of a `PciDeviceInfo` after a hot add, None after a cold one."""
    return _expect(
        VmActionPayload, api_evt, api_sender, action.VmAddGenericVhostUser, generic_vhost_user_config
    ).body


def vm_add_net(api_evt: EventFd, api_sender: ApiSender, net_config: NetConfig) -> bytes | None:
    """Return JSON of a `PciDeviceInfo` after a hot add, None after a cold one."""
    return _expect(VmActionPayload, api_evt, api_sender, action.VmAddNet, net_config).body


def vm_add_pmem(api_evt: EventFd, api_sender: ApiSender, pmem_config: device.PmemConfig) -> bytes | None:
    """Return JSON of a `PciDeviceInfo` after a hot add, None after a cold one."""
    return _expect(VmActionPayload, api_evt, api_sender, action.VmAddPmem, pmem_config).body


def vm_add_vdpa(api_evt: EventFd, api_sender: ApiSender, vdpa_config: device.VdpaConfig) -> bytes | None:
    """Return JSON of a `PciDeviceInfo` after a hot add, None after a cold one."""
    return _expect(VmActionPayload, api_evt, api_sender, action.VmAddVdpa, vdpa_config).body


def vm_add_vsock(api_evt: EventFd, api_sender: ApiSender, vsock_config: device.VsockConfig) -> bytes | None:
    """Return JSON of a `PciDeviceInfo` after a hot add, None after a cold one."""
    return _expect(VmActionPayload, api_evt, api_sender, action.VmAddVsock, vsock_config).body


def vm_migration_progress(api_evt: EventFd, api_sender: ApiSender) -> VmMigrationProgress:
    return _expect(VmMigrationProgress, api_evt, api_sender, action.VmMigrationProgressRequest)


def vm_cancel_migration(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmCancelMigration)


def vm_snapshot_progress(api_evt: EventFd, api_sender: ApiSender) -> VmSnapshotProgress:
    return _expect(VmSnapshotProgress, api_evt, api_sender, action.VmSnapshotProgressRequest)


def vm_cancel_snapshot(api_evt: EventFd, api_sender: ApiSender) -> None:
    _expect(Empty, api_evt, api_sender, action.VmCancelSnapshot)


def vmm_jobs(api_evt: EventFd, api_sender: ApiSender) -> VmmJobs:
    return _expect(VmmJobs, api_evt, api_sender, action.VmmJobsRequest)


def vmm_cancel_job(api_evt: EventFd, api_sender: ApiSender, data: operation.VmmCancelJobData) -> None:
    _expect(Empty, api_evt, api_sender, action.VmmCancelJob, data)


def vm_action(
    api_evt: EventFd, api_sender: ApiSender, vm_action: action.VmAction, data: Any = None
) -> bytes | None:
    """Carry out any action on the VM; return the JSON that it answered with, if any."""
    payload = send_request(api_evt, api_sender, vm_action.value, data)
    return payload.body if isinstance(payload, VmActionPayload) else None
