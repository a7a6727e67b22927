"""The migration under way, or the last one: how far it is, and the way to call it off."""

from __future__ import annotations

import time
from typing import Final

from cloudvmm.api.data import MigrationPhase, MigrationRole, VmMigrationProgress
from cloudvmm.api.error import MigrationCompletes, NoMigration
from cloudvmm.engine.base import Transferred
from cloudvmm.migration.cut import Cut
from cloudvmm.migration.error import Cancelled

_FIRST: Final = {
    MigrationRole.SENDER: MigrationPhase.CONNECTING,
    MigrationRole.RECEIVER: MigrationPhase.LISTENING,
}


class Migration:
    """Used by the control loop's thread, but for `note_transferred`, which any thread may call.

    `cut` ends what is done together with the other VMM; it is lent.
    """

    def __init__(self, role: MigrationRole, cut: Cut) -> None:
        self.is_cancelled = False
        self._role = role
        self._cut = cut
        self._phase = _FIRST[role]
        self._started_s = time.monotonic()
        self._ended_s: float | None = None
        self._downtime_ms: float | None = None
        self._transferred = Transferred(bytes=0)

    def note_transferred(self, transferred: Transferred) -> None:
        self._transferred = transferred

    def enter(self, phase: MigrationPhase) -> None:
        """Go on with `phase`; with `COMPLETING` there is no way back.

        :raises Cancelled: it was called off meanwhile.
        """
        if self.is_cancelled:
            raise Cancelled
        self._phase = phase

    def end(self, *, is_done: bool, downtime_ms: float | None = None) -> None:
        """It is over; `downtime_ms` is how long a guest that ran stood still, where it is known."""
        self._ended_s = time.monotonic()
        self._downtime_ms = None if downtime_ms is None else round(downtime_ms, 1)
        if is_done:
            self._phase = MigrationPhase.FINISHED
        else:
            self._phase = MigrationPhase.CANCELLED if self.is_cancelled else MigrationPhase.FAILED

    def cancel(self) -> None:
        """Call it off. What is under way fails soon, and the VM stays where it is.

        :raises NoMigration: it is over.
        :raises MigrationCompletes: it is too late.
        """
        if self._ended_s is not None:
            raise NoMigration
        if self._phase in (MigrationPhase.COMPLETING, MigrationPhase.POSTCOPY):
            raise MigrationCompletes
        self.is_cancelled = True
        self._cut.now()

    def progress(self) -> VmMigrationProgress:
        ended_s = time.monotonic() if self._ended_s is None else self._ended_s
        transferred = self._transferred
        return VmMigrationProgress(
            role=self._role,
            phase=self._phase,
            elapsed_ms=int((ended_s - self._started_s) * 1000),
            transferred_bytes=transferred.bytes,
            iteration=transferred.iteration,
            remaining_bytes=transferred.remaining_bytes,
            dirty_bytes_per_s=transferred.dirty_bytes_per_s,
            expected_downtime_ms=transferred.expected_downtime_ms,
            downtime_ms=self._downtime_ms,
        )
