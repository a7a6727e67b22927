"""For how long a connection that is lost again and again is made anew."""

from __future__ import annotations

import time
from typing import Final

from cloudvmm.migration.error import MigrationError

# What has served for so long has been made: the next loss is the first one.
SERVED_S: Final = 10.0


class LostAgain(MigrationError):
    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The connection was lost again and again for {limit_s:g} s")


class Patience:
    """Ends `limit_s` seconds after a loss since when no connection has served for `SERVED_S`."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._begun_s = time.monotonic()
        self._lost_s: float | None = None

    def begin(self) -> None:
        """There is a connection."""
        self._begun_s = time.monotonic()

    def lose(self, error: Exception) -> None:
        """It is lost.

        :raises LostAgain: and so it has been for too long; because of `error`.
        """
        now_s = time.monotonic()
        if self._lost_s is None or now_s - self._begun_s >= SERVED_S:
            self._lost_s = now_s
        if now_s - self._lost_s > self._limit_s:
            raise LostAgain(self._limit_s) from error
