"""A VMM in this process: its channel, its control loop thread, its end.

Nothing here is module-global: a process can hold any number of VMMs.
"""

from __future__ import annotations

import os
import threading

from cloudvmm import __version__
from cloudvmm.api.channel import ApiSender, api_channel
from cloudvmm.api.data import VmmPingResponse
from cloudvmm.api.error import RequestSend
from cloudvmm.control.journal import Journal
from cloudvmm.control.loop import ControlLoop
from cloudvmm.control.runner import Log
from cloudvmm.control.sibling import Siblings
from cloudvmm.engine.base import Engine
from cloudvmm.errors import VmmError
from cloudvmm.events.hub import EventHub
from cloudvmm.host.eventfd import EventFd

# The release of Cloud Hypervisor whose contract is spoken: clients sniff it.
REFERENCE_VERSION = "54.0.0"
FEATURES = ["io_uring", "kvm"]


def _ignore(level: str, text: object) -> None:
    """Log to nobody."""


class VmmThread:
    """The VMM thread, and the callers' ends of its channel.

    `api_evt` and `api_sender` may be cloned for any number of callers. Ringing `exit_evt` ends the VMM as a
    signal does.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        events: EventHub | None = None,
        state_dir: str | None = None,
        no_shutdown: bool = False,
        debugger_fd: int | None = None,
        log: Log = _ignore,
        siblings: Siblings | None = None,
    ) -> None:
        """Start the thread. On `debugger_fd`, a listening stream socket that is lent, debuggers are served.

        :raises HostError: the state folder cannot be had.
        :raises OSError: the state folder cannot be made or written.
        """
        self._journal = Journal(state_dir) if state_dir is not None else None
        self.events = events or EventHub()
        self.api_evt = EventFd()
        self.exit_evt = EventFd()
        self.api_sender: ApiSender
        self.api_sender, self._receiver = api_channel()
        self.failure: VmmError | None = None
        self._engine = engine
        self._siblings = siblings
        self._no_shutdown = no_shutdown
        self._debugger_fd = debugger_fd
        self._log = log
        if self._journal is not None and self._journal.unfinished:
            log("warn", f"The last VMM ended during: {', '.join(self._journal.unfinished)}")
        self._thread = threading.Thread(target=self._run, name="vmm", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the thread has ended; False where it has not in time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Release the descriptors of a VMM whose thread has ended."""
        self.api_evt.close()
        self.exit_evt.close()

    def _run(self) -> None:
        try:
            loop = ControlLoop(
                engine=self._engine,
                events=self.events,
                receiver=self._receiver,
                api_evt=self.api_evt,
                exit_evt=self.exit_evt,
                ping=ping_response(),
                journal=self._journal,
                log=self._log,
                no_shutdown=self._no_shutdown,
                debugger_fd=self._debugger_fd,
                siblings=self._siblings,
            )
            loop.run()
            self.failure = loop.failure
        except Exception as error:
            self.failure = VmmError(f"The VMM thread failed: {error!r}")
            self.failure.__cause__ = error
        finally:
            for request in self._receiver.close():  # where the loop could not even be made
                request.reply.send(RequestSend())
            if self._journal is not None:
                self._journal.close()


def ping_response() -> VmmPingResponse:
    return VmmPingResponse(
        build_version=f"cloudvmm-{__version__}",
        version=REFERENCE_VERSION,
        pid=os.getpid(),
        features=list(FEATURES),
    )
