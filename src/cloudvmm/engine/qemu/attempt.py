"""Something that takes its time and that another thread may abort: a start of QEMU, a wait for a back end."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from cloudvmm.engine.base import EngineError, MachineGone
from cloudvmm.engine.qemu.process import ChildProcess


class Attempt:
    """`name` is what the error calls it. It may be used again and again until it is aborted."""

    def __init__(self, name: str = "The start of QEMU") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._aborted = threading.Event()
        self._process: ChildProcess | None = None
        self._sockets: set[socket.socket] = set()

    def abort(self) -> None:
        """Make what is attempted fail soon with `MachineGone`. Any thread, any time, idempotent."""
        with self._lock:
            self._aborted.set()
            if self._process is not None:
                self._process.kill()
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def watch(self, process: ChildProcess) -> None:
        """Have `abort` kill `process`, too."""
        with self._lock:
            self._process = process
        self.check()

    @contextlib.contextmanager
    def waiting(self, lent: socket.socket) -> Iterator[None]:
        """Have `abort` shut `lent` down meanwhile, so that nobody waits on it.

        :raises MachineGone: it was aborted, whatever that made of the wait.
        """
        with self._lock:
            self._sockets.add(lent)
        try:
            self.check()
            yield
        except (OSError, EngineError):
            self.check()
            raise
        finally:
            with self._lock:
                self._sockets.discard(lent)

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
