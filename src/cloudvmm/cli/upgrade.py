"""`cloudvmm upgrade`: take over the VM of a cloudvmm that runs, and its place at the API socket.

The new VMM is this process. It listens beside the API socket, receives the VM by a local migration, and moves
its socket over the other's once the VM is here; until then the other has the VM and answers, whatever fails.
This is an order of commands that there are anyway; how a VM moves is `control`'s.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from cloudvmm import api
from cloudvmm.api import MigrationPhase
from cloudvmm.cli.error import StartError
from cloudvmm.client import Client
from cloudvmm.client.error import ClientError
from cloudvmm.config.operation import VmReceiveMigrationData, VmSendMigrationData
from cloudvmm.control.runner import Log
from cloudvmm.control.vmm import VmmThread
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.events.hub import Event
from cloudvmm.http.error import HttpServerError
from cloudvmm.http.server import HttpServer

END_S: Final = 10.0
_LOOK_S: Final = 0.02
_ASK_S: Final = 0.2
_OVER: Final = (MigrationPhase.FAILED, MigrationPhase.CANCELLED)


class UpgradeFailed(StartError):
    """The VM could not be taken over, and stays where it is"""


class VmNotSent(StartError):
    """The other VMM could not send its VM: its log tells why"""


def take_over(path: str, vmm: VmmThread, server: HttpServer, *, log: Log) -> None:
    """Blocking. Have `vmm` go on with the VM of the VMM at `path`, and `server`, now beside it, be there.

    Return when the other VMM has ended, or will not.

    :raises UpgradeFailed: it could not be done; the other VMM goes on as before.
    """
    url = f"unix:{path}.{os.getpid()}.migration"
    place = _Place(path, server)
    with Client(path) as other:
        _receive(other, vmm, url, place)
    try:
        previous = place.take()
        log("info", f"The VM is here, and {path} is ours")
        _see_off(previous, vmm, server, log)
    except HttpServerError as error:  # to end would be the end of the VM
        log(
            "error", f"The VM is here, and the other VMM's place is not ours: {', '.join(error_chain(error))}"
        )


class _Place:
    """The path of the other VMM's API socket, to be taken once."""

    def __init__(self, path: str, server: HttpServer) -> None:
        self._path = path
        self._server = server
        self._previous: str | None = None

    def take(self) -> str:
        """Return where the other VMM is found. :raises HttpServerError: the operating system refuses."""
        if self._previous is None:
            self._previous = self._server.take_place(self._path)
        return self._previous

    def hear(self, event: Event) -> None:
        """Take it as soon as the VM runs here: before the other VMM hears of it, which then ends."""
        if event.event == "resumed":
            with contextlib.suppress(HttpServerError):  # it is tried once more
                self.take()


def _receive(other: Client, vmm: VmmThread, url: str, place: _Place) -> None:
    try:
        other.vmm_ping()
    except ClientError as error:
        raise UpgradeFailed from error
    ignore = vmm.events.subscribe(place.hear)
    try:
        with _Request(other, vmm, url) as request:
            try:
                data = VmReceiveMigrationData(receiver_url=url)
                api.vm_receive_migration(vmm.api_evt, vmm.api_sender, data)
            except api.ApiError as error:
                raise UpgradeFailed from request.failure or error
    finally:
        ignore()


class _Request:
    """Asks the other VMM, once ours listens at `url`, to send its VM; while it is entered."""

    def __init__(self, other: Client, vmm: VmmThread, url: str) -> None:
        self.failure: VmmError | None = None
        self._other = other
        self._vmm = vmm
        self._url = url
        self._may_go_on = threading.Event()
        self._has_come = threading.Event()
        self._is_ready = False
        self._unsubscribe: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="upgrade", daemon=True)

    def __enter__(self) -> _Request:
        self._unsubscribe = self._vmm.events.subscribe(self._hear)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._unsubscribe()
        self._may_go_on.set()
        self._has_come.set()
        self._thread.join(END_S)  # the other VMM may answer nobody

    def _hear(self, event: Event) -> None:
        if event.event == "migration-receive-ready":
            self._is_ready = True
            self._may_go_on.set()
        if event.event == "migration-receive-started":
            self._has_come.set()

    def _run(self) -> None:
        self._may_go_on.wait()
        if not self._is_ready:
            return
        try:
            self._other.vm_send_migration(VmSendMigrationData(destination_url=self._url, local=True))
            self._await_sender()
        except (ClientError, VmNotSent) as error:
            self.failure = error
            with contextlib.suppress(api.ApiError):  # it is over already
                api.vm_cancel_migration(self._vmm.api_evt, self._vmm.api_sender)

    def _await_sender(self) -> None:
        """Wait until the other VMM has connected. :raises VmNotSent: it has given up before."""
        while not self._has_come.wait(_ASK_S):
            if self._other.vm_migration_progress().phase in _OVER:
                raise VmNotSent


def _see_off(previous: str, vmm: VmmThread, server: HttpServer, log: Log) -> None:
    """Wait until the other VMM, found at `previous`, has ended; it is told to where it does not know why."""
    if _wait_end(vmm, server):
        return
    # It was never told that the VM is here, and keeps its own paused. It is here.
    try:
        with Client(previous) as other:
            other.vmm_shutdown()
    except ClientError as error:
        log("warn", f"The other VMM was not told to end: {': '.join(error_chain(error))}")
    if not _wait_end(vmm, server):
        log("error", f"The other VMM does not end; its API socket is {previous}")


def _wait_end(vmm: VmmThread, server: HttpServer) -> bool:
    """Wait until the path is ours alone; give up after `END_S`, or where our own VMM ends."""
    deadline_s = time.monotonic() + END_S
    while not server.claim():
        if time.monotonic() > deadline_s or vmm.join(_LOOK_S):
            return False
    return True
