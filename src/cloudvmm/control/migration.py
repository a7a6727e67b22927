"""The migration under way, or the last one: how far it is, and the way to call it off."""

from __future__ import annotations

from typing import Final

from cloudvmm.api.data import MigrationPhase, MigrationRole, VmMigrationProgress
from cloudvmm.api.error import MigrationCompletes, NoMigration
from cloudvmm.control.undertaking import Phases, Refusals, Undertaking
from cloudvmm.engine.base import Transferred
from cloudvmm.migration.cut import Cut
from cloudvmm.migration.error import Cancelled

_FIRST: Final = {
    MigrationRole.SENDER: MigrationPhase.CONNECTING,
    MigrationRole.RECEIVER: MigrationPhase.LISTENING,
}
_PHASES: Final = Phases(
    completing=(MigrationPhase.COMPLETING, MigrationPhase.POSTCOPY),
    finished=MigrationPhase.FINISHED,
    failed=MigrationPhase.FAILED,
    cancelled=MigrationPhase.CANCELLED,
)
_REFUSALS: Final = Refusals(nothing=NoMigration, too_late=MigrationCompletes, cancelled=Cancelled)


class Migration(Undertaking[MigrationPhase]):
    """`cut` ends what is done together with the other VMM; it is lent."""

    def __init__(self, role: MigrationRole, cut: Cut) -> None:
        super().__init__(_FIRST[role], _PHASES, _REFUSALS)
        self._role = role
        self._cut = cut
        self._downtime_ms: float | None = None
        self._transferred = Transferred(bytes=0)

    @property
    def done_bytes(self) -> int | None:
        return self._transferred.bytes or None

    @property
    def total_bytes(self) -> int | None:
        transferred = self._transferred
        left = transferred.remaining_bytes
        return None if left is None else transferred.bytes + left

    def note_transferred(self, transferred: Transferred) -> None:
        """For any thread."""
        self._transferred = transferred

    def end(self, *, is_done: bool, downtime_ms: float | None = None) -> None:
        """It is over; `downtime_ms` is how long a guest that ran stood still, where it is known."""
        self._downtime_ms = None if downtime_ms is None else round(downtime_ms, 1)
        self._end(is_done=is_done)

    def progress(self) -> VmMigrationProgress:
        transferred = self._transferred
        return VmMigrationProgress(
            role=self._role,
            phase=self._phase,
            elapsed_ms=self._elapsed_ms,
            transferred_bytes=transferred.bytes,
            iteration=transferred.iteration,
            remaining_bytes=transferred.remaining_bytes,
            dirty_bytes_per_s=transferred.dirty_bytes_per_s,
            expected_downtime_ms=transferred.expected_downtime_ms,
            downtime_ms=self._downtime_ms,
        )

    def _interrupt(self) -> None:
        self._cut.now()
