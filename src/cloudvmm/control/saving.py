"""The snapshot that is being taken, or the last one: how far it is, and the way to call it off."""

from __future__ import annotations

from typing import Final

from cloudvmm.api.data import SnapshotPhase, VmSnapshotProgress
from cloudvmm.api.error import NoSnapshot, SnapshotCancelled, SnapshotCompletes
from cloudvmm.control.undertaking import Phases, Refusals, Undertaking
from cloudvmm.engine.base import Saved

_PHASES: Final = Phases(
    completing=(SnapshotPhase.COMPLETING,),
    finished=SnapshotPhase.FINISHED,
    failed=SnapshotPhase.FAILED,
    cancelled=SnapshotPhase.CANCELLED,
)
_REFUSALS: Final = Refusals(nothing=NoSnapshot, too_late=SnapshotCompletes, cancelled=SnapshotCancelled)


class Saving(Undertaking[SnapshotPhase]):
    """Begins with the phase Saving."""

    def __init__(self) -> None:
        super().__init__(SnapshotPhase.SAVING, _PHASES, _REFUSALS)
        self._saved = Saved(0, 0)

    @property
    def done_bytes(self) -> int | None:
        return self._saved.bytes if self._saved.total_bytes else None

    @property
    def total_bytes(self) -> int | None:
        return self._saved.total_bytes or None

    def note_saved(self, saved: Saved) -> None:
        """For any thread.

        :raises SnapshotCancelled: it was called off.
        """
        self._saved = saved
        self.check()

    def end(self, *, is_done: bool) -> None:
        self._end(is_done=is_done)

    def progress(self) -> VmSnapshotProgress:
        return VmSnapshotProgress(
            phase=self._phase,
            elapsed_ms=self._elapsed_ms,
            saved_bytes=self._saved.bytes,
            total_bytes=self._saved.total_bytes,
        )
