"""A debugger beside us: QEMU serves one on a socket, and it stops the guest and lets it go on as it likes.

QEMU tells that the guest stops or runs, and not by whose will. What we will ourselves is noted before it is
asked for, so the rest is the debugger's.
"""

from __future__ import annotations

from typing import Final

from cloudvmm.engine.base import DebuggerContinued, DebuggerStopped, EngineError, EngineEvent
from cloudvmm.engine.qemu.qmp import QmpClient

_NAME: Final = "gdb"
# What `query-status` says where a debugger stopped the guest: at a breakpoint, or by connecting or Ctrl-C.
_STOPPED: Final = ("debug", "paused")


class DebuggerNotServed(EngineError):
    """QEMU cannot serve a debugger; the text is its own words."""


def serve_debugger(control: QmpClient, listening_fd: int) -> None:
    """Blocking. Have QEMU serve whoever connects to a listening socket, which is lent.

    :raises EngineError: it does not.
    """
    control.execute("getfd", {"fdname": _NAME}, fds=[listening_fd])
    address = {"type": "fd", "data": {"str": _NAME}}
    backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
    control.execute("chardev-add", {"id": _NAME, "backend": backend})
    # There is no command of QMP for it.
    words = control.execute("human-monitor-command", {"command-line": f"gdbserver chardev:{_NAME}"})
    if not words.startswith("Waiting"):
        raise DebuggerNotServed(words.strip())


class DebugWatch:
    """What the debugger does. `want` belongs to who asks QEMU, the rest to who hears it.

    A stop is told of once QEMU has said why; `turn`, taken when it is asked, shows whether that still counts.
    """

    def __init__(self) -> None:
        self.turn = 0
        self._is_to_run = False
        self._is_held = False

    def want(self, *, is_to_run: bool) -> None:
        """We are about to let the guest run, or to stop it."""
        self._is_to_run = is_to_run
        self._is_held = False

    def hear_resume(self) -> list[EngineEvent]:
        self.turn += 1
        is_ours = self._is_to_run and not self._is_held
        self._is_to_run, self._is_held = True, False
        return [] if is_ours else [DebuggerContinued()]

    def judge_stop(self, status: object, turn: int) -> list[EngineEvent]:
        """Return what it means that QEMU says `status` of a guest that had stopped at `turn`."""
        if turn != self.turn or not self._is_to_run or status not in _STOPPED:
            return []
        self._is_held = True
        return [DebuggerStopped()]
