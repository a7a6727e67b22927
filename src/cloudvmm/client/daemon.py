"""The client of a daemon's own socket: VMMs are made, listed and ended over it.

Each VMM is then spoken to with `Client`, at the socket that is told.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from cloudvmm.client.transport import DEFAULT_TIMEOUT_S, UnixTransport

if TYPE_CHECKING:
    from cloudvmm.api.data import DaemonPingResponse, HeldJobs, HeldVmm, HeldVmms
    from cloudvmm.api.fleet import VmmsCancelJobData, VmmsCreateData, VmmsDeleteData
    from cloudvmm.client.reply import Reply

T = TypeVar("T")


class DaemonCommand(Generic[T]):
    """`name` is the one on the wire; `answer` is the name of a type of `cloudvmm.api.data`, None for none."""

    __slots__ = ("answer", "method", "name")

    def __init__(self, name: str, answer: str | None = None, *, method: str = "PUT") -> None:
        self.name = name
        self.answer = answer
        self.method = method

    def __repr__(self) -> str:
        return f"DaemonCommand({self.name})"


DAEMON_PING: DaemonCommand[DaemonPingResponse] = DaemonCommand(
    "daemon.ping", "DaemonPingResponse", method="GET"
)
DAEMON_SHUTDOWN: DaemonCommand[None] = DaemonCommand("daemon.shutdown")
VMMS_CREATE: DaemonCommand[HeldVmm] = DaemonCommand("vmms.create", "HeldVmm")
VMMS_LIST: DaemonCommand[HeldVmms] = DaemonCommand("vmms.list", "HeldVmms", method="GET")
VMMS_DELETE: DaemonCommand[None] = DaemonCommand("vmms.delete")
VMMS_JOBS: DaemonCommand[HeldJobs] = DaemonCommand("vmms.jobs", "HeldJobs", method="GET")
VMMS_CANCEL_JOB: DaemonCommand[None] = DaemonCommand("vmms.cancel-job")

DAEMON_COMMANDS: Final[tuple[DaemonCommand[Any], ...]] = (
    DAEMON_PING,
    DAEMON_SHUTDOWN,
    VMMS_CREATE,
    VMMS_LIST,
    VMMS_DELETE,
    VMMS_JOBS,
    VMMS_CANCEL_JOB,
)
"""In the order of `cloudvmm.api.fleet.DAEMON_COMMANDS`."""


class DaemonClient:
    """Speaks to the daemon whose own socket is at `path`; connects on first use, and again after a loss.

    A command has `timeout_s`; None is no limit. Any number of threads may share a client. Every method
    blocks, and raises what `call` raises.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        self.transport = UnixTransport(path, timeout_s=timeout_s)

    @property
    def path(self) -> str:
        return self.transport.path

    def call(self, command: DaemonCommand[T], data: object = None, *, timeout_s: float | None = None) -> T:
        """Carry out any of `DAEMON_COMMANDS`; `timeout_s` replaces the client's own limit.

        :raises ServerError: the daemon refused, or the command failed; its causes say why.
        :raises ClientError: there is no answer; `may_have_run` tells what that means.
        """
        body = encode_body(data)
        reply = self.transport.request(command.method, command.name, body, timeout_s=timeout_s)
        value: T = read_daemon_reply(command, reply)
        return value

    def daemon_ping(self) -> DaemonPingResponse:
        """Say who answers, and how many VMMs there are."""
        return self.call(DAEMON_PING)

    def daemon_shutdown(self) -> None:
        """End every VMM, their VMs with them, then the daemon."""
        self.call(DAEMON_SHUTDOWN)

    def vmms_create(self, data: VmmsCreateData) -> HeldVmm:
        """Make a VMM, which holds no VM, and tell the socket at which it answers already."""
        return self.call(VMMS_CREATE, data)

    def vmms_list(self) -> HeldVmms:
        """Tell which VMMs there are, where they answer, and how their VMs are."""
        return self.call(VMMS_LIST)

    def vmms_delete(self, data: VmmsDeleteData) -> None:
        """End a VMM, its VM with it; nothing of it stays."""
        self.call(VMMS_DELETE, data)

    def vmms_jobs(self) -> HeldJobs:
        """Tell which commands are under way and which wait on all VMMs, and how far they are."""
        return self.call(VMMS_JOBS)

    def vmms_cancel_job(self, data: VmmsCancelJobData) -> None:
        """Call off a job of a VMM: whoever asked for it gets an error."""
        self.call(VMMS_CANCEL_JOB, data)

    def close(self) -> None:
        """Close the connections that are kept. The client can be used again."""
        self.transport.close()

    def __enter__(self) -> DaemonClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode_body(data: object) -> bytes | None:
    if data is None:
        return None
    import msgspec

    return msgspec.json.encode(data)


def read_daemon_reply(command: DaemonCommand[Any], reply: Reply) -> Any:
    """Return the value that `reply` holds.

    :raises ServerError: it is not a success.
    :raises AnswerNotUnderstood: it is, of an unknown form.
    """
    if reply.status not in (200, 204):
        from cloudvmm.client.chain import failure

        raise failure(command.name, reply)
    if command.answer is None:
        return None
    from cloudvmm.client.codec import decode_as

    return decode_as(command.name, command.answer, reply.body)
