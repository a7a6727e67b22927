"""How much time is left."""

from __future__ import annotations

import time


class Deadline:
    """Begins now. `timeout_s` of None is no limit."""

    __slots__ = ("_end", "_timeout_s")

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        """Return the seconds left, more than 0, or None for no limit.

        :raises TimeoutError: there are none.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"The time of {self._timeout_s:g} s is up")
        return left
