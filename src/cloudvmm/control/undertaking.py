"""What takes long: it can be called off while it goes on, and whoever asks hears how far it is.

`migration.py` and `saving.py` say what that is of a migration and of a snapshot.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Generic, TypeVar

import msgspec

from cloudvmm.api.data import ApiResponsePayload
from cloudvmm.errors import VmmError

P = TypeVar("P")


class Phases(msgspec.Struct, Generic[P], frozen=True, kw_only=True):
    """From the first of `completing` on there is no way back; the others are the ways to end."""

    completing: tuple[P, ...]
    finished: P
    failed: P
    cancelled: P


class Refusals(msgspec.Struct, frozen=True, kw_only=True):
    """Why it is not cancelled: `nothing` is under way, or it is `too_late`. `cancelled` ends it."""

    nothing: type[VmmError]
    too_late: type[VmmError]
    cancelled: type[VmmError]


class Undertaking(Generic[P]):
    """Used by the control loop's thread; `check` and `is_cancelled` by any."""

    def __init__(self, first: P, phases: Phases[P], refusals: Refusals) -> None:
        self.is_cancelled = False
        self._phase = first
        self._phases = phases
        self._refusals = refusals
        self._started_s = time.monotonic()
        self._ended_s: float | None = None

    @property
    def is_over(self) -> bool:
        return self._ended_s is not None

    @property
    def can_cancel(self) -> bool:
        return not self.is_over and self._phase not in self._phases.completing

    @property
    def done_bytes(self) -> int | None:
        """How much of `total_bytes` is done with, None where that is not known."""
        return None

    @property
    def total_bytes(self) -> int | None:
        return None

    def check(self) -> None:
        """:raises VmmError: it was called off."""
        if self.is_cancelled:
            raise self._refusals.cancelled

    def enter(self, phase: P) -> None:
        """Go on with `phase`.

        :raises VmmError: it was called off meanwhile.
        """
        self.check()
        self._phase = phase

    def cancel(self) -> None:
        """Call it off: what is under way fails soon.

        :raises VmmError: it is over, or too late.
        """
        if self.is_over:
            raise self._refusals.nothing
        if self._phase in self._phases.completing:
            raise self._refusals.too_late
        self.is_cancelled = True
        self._interrupt()

    @abstractmethod
    def progress(self) -> ApiResponsePayload:
        """How far it is, or how it ended."""

    def _interrupt(self) -> None:
        """Wake what would not look at `is_cancelled` soon."""

    def _end(self, *, is_done: bool) -> None:
        self._ended_s = time.monotonic()
        if is_done:
            self._phase = self._phases.finished
        else:
            self._phase = self._phases.cancelled if self.is_cancelled else self._phases.failed

    @property
    def _elapsed_ms(self) -> int:
        ended_s = time.monotonic() if self._ended_s is None else self._ended_s
        return int((ended_s - self._started_s) * 1000)
