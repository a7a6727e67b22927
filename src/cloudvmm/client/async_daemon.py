"""The client of a daemon's own socket, for asyncio."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from cloudvmm.client import daemon
from cloudvmm.client.async_transport import AsyncUnixTransport
from cloudvmm.client.transport import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from cloudvmm.api.data import DaemonPingResponse, HeldJobs, HeldVmm, HeldVmms
    from cloudvmm.api.fleet import VmmsCancelJobData, VmmsCreateData, VmmsDeleteData
    from cloudvmm.client.daemon import DaemonCommand

T = TypeVar("T")


class AsyncDaemonClient:
    """What `DaemonClient` is, for the tasks of an event loop: any number of them may share one."""

    def __init__(self, path: str | os.PathLike[str], *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        self.transport = AsyncUnixTransport(path, timeout_s=timeout_s)

    @property
    def path(self) -> str:
        return self.transport.path

    async def call(
        self, command: DaemonCommand[T], data: object = None, *, timeout_s: float | None = None
    ) -> T:
        """As `DaemonClient.call`."""
        body = daemon.encode_body(data)
        reply = await self.transport.request(command.method, command.name, body, timeout_s=timeout_s)
        value: T = daemon.read_daemon_reply(command, reply)
        return value

    async def daemon_ping(self) -> DaemonPingResponse:
        """Say who answers, and how many VMMs there are."""
        return await self.call(daemon.DAEMON_PING)

    async def daemon_shutdown(self) -> None:
        """End every VMM, their VMs with them, then the daemon."""
        await self.call(daemon.DAEMON_SHUTDOWN)

    async def vmms_create(self, data: VmmsCreateData) -> HeldVmm:
        """Make a VMM, which holds no VM, and tell the socket at which it answers already."""
        return await self.call(daemon.VMMS_CREATE, data)

    async def vmms_list(self) -> HeldVmms:
        """Tell which VMMs there are, where they answer, and how their VMs are."""
        return await self.call(daemon.VMMS_LIST)

    async def vmms_delete(self, data: VmmsDeleteData) -> None:
        """End a VMM, its VM with it; nothing of it stays."""
        await self.call(daemon.VMMS_DELETE, data)

    async def vmms_jobs(self) -> HeldJobs:
        """Tell which commands are under way and which wait on all VMMs, and how far they are."""
        return await self.call(daemon.VMMS_JOBS)

    async def vmms_cancel_job(self, data: VmmsCancelJobData) -> None:
        """Call off a job of a VMM: whoever asked for it gets an error."""
        await self.call(daemon.VMMS_CANCEL_JOB, data)

    def close(self) -> None:
        """Close the connections that are kept. The client can be used again."""
        self.transport.close()

    async def __aenter__(self) -> AsyncDaemonClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
