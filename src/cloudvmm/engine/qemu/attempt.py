"""Something that takes its time and that another thread may abort: a start of QEMU, a wait for a back end."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Protocol

from cloudvmm.engine.base import EngineError, MachineGone
from cloudvmm.engine.qemu.confinement import Policy
from cloudvmm.host.cgroup import ControlGroup
from cloudvmm.host.user import User


class Program(Protocol):
    """A process that can be ended, by any thread, and more than once."""

    def kill(self) -> None: ...


class Attempt:
    """`name` is what the error calls it. It may be used again and again until it is aborted.

    `policy` is for the programs that are started meanwhile. With `state_dir`, a folder, they outlive us, and
    are found again there. `user` is whom QEMU runs as, where that is not us. `group` (lent) is the control
    group that they are in, if they are in one of their own.
    """

    def __init__(
        self,
        name: str = "The start of QEMU",
        *,
        policy: Policy | None = None,
        state_dir: str | None = None,
        user: User | None = None,
        group: ControlGroup | None = None,
    ) -> None:
        self.policy = policy or Policy()
        self.user = user
        self.group = group
        self._name = name
        self.state_dir = state_dir
        self._lock = threading.Lock()
        self._aborted = threading.Event()
        self._process: Program | None = None
        self._lent: set[socket.socket | Program] = set()

    def abort(self) -> None:
        """Make what is attempted fail soon with `MachineGone`. Any thread, any time, idempotent."""
        with self._lock:
            self._aborted.set()
            if self._process is not None:
                self._process.kill()
            for each in self._lent:
                _end(each)

    def watch(self, process: Program) -> None:
        """Have `abort` kill `process`, too."""
        with self._lock:
            self._process = process
        self.check()

    @contextlib.contextmanager
    def waiting(self, *lent: socket.socket | Program) -> Iterator[None]:
        """Have `abort` end what is `lent` meanwhile, so that nobody waits for it.

        :raises MachineGone: it was aborted, whatever that made of the wait.
        """
        with self._lock:
            self._lent.update(lent)
        try:
            self.check()
            yield
        except (OSError, EngineError):
            self.check()
            raise
        finally:
            with self._lock:
                self._lent.difference_update(lent)

    def pause(self, pause_s: float) -> None:
        """Blocking, `pause_s` long.

        :raises MachineGone: it was aborted.
        """
        self._aborted.wait(pause_s)
        self.check()

    def check(self) -> None:
        """:raises MachineGone: it was aborted."""
        with self._lock:
            if self._aborted.is_set():
                if self._process is not None:
                    self._process.kill()
                raise MachineGone(f"{self._name} was aborted")


def _end(lent: socket.socket | Program) -> None:
    if isinstance(lent, socket.socket):
        with contextlib.suppress(OSError):
            lent.shutdown(socket.SHUT_RDWR)
    else:
        lent.kill()
