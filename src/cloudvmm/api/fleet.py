"""The closed list of a daemon's own commands, beside `action.COMMANDS`, which each of its VMMs has.

They are made as those are, and everything that names them is derived from `DAEMON_COMMANDS`. A plain VMM
does not load this.
"""

from __future__ import annotations

import msgspec

from cloudvmm.api.action import ApiRequest, Effect
from cloudvmm.api.data import DaemonPingResponse, HeldJobs, HeldVmm, HeldVmms
from cloudvmm.api.error import ApiError
from cloudvmm.config.number import U64


class VmmsCreateData(msgspec.Struct, kw_only=True):
    id: str


class VmmsDeleteData(msgspec.Struct, kw_only=True):
    id: str


class VmmsCancelJobData(msgspec.Struct, kw_only=True):
    vmm: str
    id: U64


class DaemonPingError(ApiError):
    """The daemon did not answer"""


class DaemonShutdownError(ApiError):
    """The daemon could not shutdown"""


class VmmsCreateError(ApiError):
    """The VMM could not be created"""


class VmmsListError(ApiError):
    """Error listing the VMMs"""


class VmmsDeleteError(ApiError):
    """The VMM could not be deleted"""


class VmmsJobsError(ApiError):
    """Error looking at the jobs of the VMMs"""


class VmmsCancelJobError(ApiError):
    """Error cancelling the job of a VMM"""


class DaemonPing(ApiRequest):
    """Say who answers, and how many VMMs there are. Allowed always."""

    name = "daemon.ping"
    answer = DaemonPingResponse
    error = DaemonPingError
    effect = Effect.READS
    is_on_dbus = False


class DaemonShutdown(ApiRequest):
    """End every VMM, their VMs with them, then the daemon. It is answered when they have ended.

    One that does not end in time is said so, and ends with the process.
    """

    name = "daemon.shutdown"
    error = DaemonShutdownError
    is_on_dbus = False


class VmmsCreate(ApiRequest):
    """Make a VMM, which holds no VM, and tell the socket at which it answers already. All or nothing.

    It fails where there is one of that name, or where there are as many as there may be.
    """

    name = "vmms.create"
    body = VmmsCreateData
    answer = HeldVmm
    error = VmmsCreateError
    is_on_dbus = False


class VmmsList(ApiRequest):
    """Tell which VMMs there are, where they answer, and how their VMs are."""

    name = "vmms.list"
    answer = HeldVmms
    error = VmmsListError
    effect = Effect.READS
    is_on_dbus = False


class VmmsDelete(ApiRequest):
    """End a VMM, its VM with it, whatever it does; nothing of it stays. Answered when it has ended."""

    name = "vmms.delete"
    body = VmmsDeleteData
    error = VmmsDeleteError
    is_on_dbus = False


class VmmsJobs(ApiRequest):
    """Tell which commands are under way and which wait on all VMMs, and how far they are."""

    name = "vmms.jobs"
    answer = HeldJobs
    error = VmmsJobsError
    effect = Effect.READS
    is_on_dbus = False


class VmmsCancelJob(ApiRequest):
    """Call off a job of a VMM, as `vmm.cancel-job` on its own socket does."""

    name = "vmms.cancel-job"
    body = VmmsCancelJobData
    error = VmmsCancelJobError
    is_on_dbus = False


DAEMON_COMMANDS: tuple[type[ApiRequest], ...] = (
    DaemonPing,
    DaemonShutdown,
    VmmsCreate,
    VmmsList,
    VmmsDelete,
    VmmsJobs,
    VmmsCancelJob,
)
