"""A VMM in this process: its channel, its control loop thread, its end.

Nothing here is module-global: a process can hold any number of VMMs.
"""

from __future__ import annotations

import os
import threading

from cloudvmm import __version__
from cloudvmm.api.channel import api_channel
from cloudvmm.api.ping import Pong
from cloudvmm.api.plumbing import RequestSend
from cloudvmm.control.loop import ControlLoop
from cloudvmm.errors import VmmError
from cloudvmm.events.hub import EventHub
from cloudvmm.host.eventfd import EventFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloudvmm.api.channel import ApiSender
    from cloudvmm.control.dispatch import Dispatch
    from cloudvmm.control.journal import Journal
    from cloudvmm.control.runner import Log
    from cloudvmm.control.sibling import Siblings
    from cloudvmm.engine.base import Engine

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
        self._journal = None if state_dir is None else _open_journal(state_dir)
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
        if state_dir is not None:
            self.events.keep(f"{state_dir}/events")
        if self._journal is not None and self._journal.unfinished:
            log("warn", f"The last VMM ended during: {', '.join(self._journal.unfinished)}")
        self._ping = _pong()
        self._settled = threading.Event()
        self._has_adopted = False
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

    def has_adopted(self) -> bool:
        """Blocking, briefly. Say whether a VM goes on here that another VMM on the state folder has left."""
        self._settled.wait()
        return self._has_adopted

    def _adopt(self, loop: ControlLoop) -> bool:
        """Say whether to go on; where not, what is in the state folder stays as it is."""
        try:
            self._has_adopted = self._journal is not None and loop.adopt()
        except VmmError as error:
            self.failure = error
        self._settled.set()
        return self.failure is None

    def _run(self) -> None:
        try:
            loop = ControlLoop(
                self._make_dispatch,
                receiver=self._receiver,
                api_evt=self.api_evt,
                exit_evt=self.exit_evt,
                ping=self._ping,
                log=self._log,
            )
            if self._adopt(loop):
                loop.run()
                self.failure = loop.failure
            else:
                loop.close()
        except Exception as error:
            self.failure = VmmError(f"The VMM thread failed: {error!r}")
            self.failure.__cause__ = error
        finally:
            self._settled.set()
            for request in self._receiver.close():  # where the loop could not even be made
                request.reply.send(RequestSend())
            self.events.end_keeping()
            if self._journal is not None:
                self._journal.close()

    def _make_dispatch(self, loop: ControlLoop) -> Dispatch:
        from cloudvmm.control.dispatch import Dispatch

        return Dispatch(
            loop.listen,
            loop.unlisten,
            engine=self._engine,
            events=self.events,
            ping=self._ping,
            journal=self._journal,
            log=self._log,
            no_shutdown=self._no_shutdown,
            debugger_fd=self._debugger_fd,
            siblings=self._siblings,
        )


def _open_journal(state_dir: str) -> Journal:
    from cloudvmm.control.journal import Journal

    return Journal(state_dir)


def _pong() -> Pong:
    """Say who answers; by hand, since what writes JSON is not loaded yet."""
    features = ",".join(f'"{feature}"' for feature in FEATURES)
    names = f'"build_version":"cloudvmm-{__version__}","version":"{REFERENCE_VERSION}"'
    return Pong(f'{{{names},"pid":{os.getpid()},"features":[{features}]}}'.encode())
