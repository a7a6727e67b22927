"""A child of another process, which it has outlived: what `process.py` gives of our own children.

It is no child of ours, so nobody tells how it ended, only that it did.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading

from cloudvmm.engine.base import EngineError
from cloudvmm.engine.qemu.process import ChildProcess
from cloudvmm.host.foreign import ForeignProcess

_STANDARD_ERROR = 2


class AdoptedProcess(ChildProcess):
    """Owns the pidfd of `found`, and a descriptor of what it writes its words to."""

    def __init__(
        self, found: ForeignProcess, *, name: str, pid_file: str, state_dir: str | None = None
    ) -> None:
        """:raises EngineError: its words cannot be had; `found` is then still the caller's."""
        try:
            self._log_fd = found.take(_STANDARD_ERROR)
        except OSError as error:
            raise EngineError(f"The log of {name} could not be opened") from error
        self._name = name
        self._state_dir = state_dir
        self._pid_file = pid_file
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._status: os.waitid_result | None = None
        self._has_ended = False
        self._final_words = ""
        self._pidfd, found.pidfd = found.pidfd, -1
        self.pid = found.pid
        self._keeper: threading.Thread | None = None
        if state_dir is not None:
            keeper = threading.Thread(target=self._keep_log_small, name="child-keeper", daemon=True)
            with contextlib.suppress(RuntimeError):  # a log that grows is no reason to lose a guest
                keeper.start()
                self._keeper = keeper

    def has_ended(self) -> bool:
        with self._lock:
            if not self._has_ended and self._pidfd >= 0:
                poller = select.poll()
                poller.register(self._pidfd, select.POLLIN)
                self._has_ended = bool(poller.poll(0))
            return self._has_ended
