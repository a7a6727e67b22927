"""A daemon's own commands: what each does to the fleet. The threads of its clients carry them out."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Final

from cloudvmm import __version__
from cloudvmm.api import fleet as command
from cloudvmm.api.action import ApiRequest
from cloudvmm.api.data import ApiResponsePayload, DaemonPingResponse, Empty
from cloudvmm.control.failure import failed
from cloudvmm.daemon.fleet import Fleet
from cloudvmm.errors import VmmError
from cloudvmm.http.route import routes_of

SHUTDOWN_S: Final = 60.0


class DaemonService:
    """An `http.service.Service`. `on_shutdown` is told when the fleet has ended and the daemon is to."""

    is_vmm = False
    routes = routes_of(command.DAEMON_COMMANDS)

    def __init__(self, fleet: Fleet, on_shutdown: Callable[[], None]) -> None:
        self._fleet = fleet
        self._on_shutdown = on_shutdown
        self._handlers: dict[type[ApiRequest], Callable[[Any], ApiResponsePayload]] = {
            command.DaemonPing: lambda _: self._ping(),
            command.DaemonShutdown: lambda _: self._shutdown(),
            command.VmmsCreate: lambda data: fleet.create(data.id),
            command.VmmsList: lambda _: fleet.vmms(),
            command.VmmsDelete: lambda data: self._delete(data.id),
            command.VmmsJobs: lambda _: fleet.jobs(),
            command.VmmsCancelJob: lambda data: self._cancel_job(data.vmm, data.id),
        }

    def ask(self, request: ApiRequest, fds: list[int]) -> None:
        """Blocking. Carry out and answer; no command takes descriptors."""
        try:
            payload = self._handlers[type(request)](request.data)
        except (VmmError, OSError) as error:
            request.reply.send(failed(request.error, error))
        else:
            request.reply.send(payload)

    def document(self) -> bytes:
        # Worth importing only where someone reads it.
        from cloudvmm.http.daemon_openapi import document_json

        return document_json()

    def close(self) -> None:
        """Nothing to release: the fleet is somebody else's."""

    def _ping(self) -> DaemonPingResponse:
        return DaemonPingResponse(
            build_version=f"cloudvmm-{__version__}",
            pid=os.getpid(),
            vmms=self._fleet.count,
            max_vmms=self._fleet.max_vmms,
        )

    def _shutdown(self) -> Empty:
        self._fleet.end()
        try:
            self._fleet.wait(SHUTDOWN_S)
        finally:
            self._on_shutdown()
        return Empty()

    def _delete(self, vmm_id: str) -> Empty:
        self._fleet.delete(vmm_id)
        return Empty()

    def _cancel_job(self, vmm_id: str, job_id: int) -> Empty:
        self._fleet.cancel_job(vmm_id, job_id)
        return Empty()
