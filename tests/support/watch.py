"""How long something takes, without the time for which the host stood still.

A host that has many machines may let one of them stand still for seconds, as a whole. What a clock says of a
wait behind that says nothing about who was waited for. So time is taken in steps, and a step that took much
longer than it should counts little: in it nothing ran that could have been waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

STEP_S: Final = 0.02
LONGEST_STEP_S: Final = 0.1


class Ticker:
    """Adds up the steps between calls of `tick`, each by `longest_step_s` at most."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, longest_step_s: float = LONGEST_STEP_S
    ) -> None:
        self.elapsed_s = 0.0
        self._longest_step_s = longest_step_s
        self._clock = clock
        self._last_s = clock()

    def tick(self) -> float:
        """Return the seconds that count since the beginning."""
        now_s = self._clock()
        self.elapsed_s += min(now_s - self._last_s, self._longest_step_s)
        self._last_s = now_s
        return self.elapsed_s


class SteadyClock:
    """Tells any thread the seconds that count; `start` gives it the thread that takes them in steps."""

    def __init__(self) -> None:
        self._ticker = Ticker()
        self._lock = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._run, name="clock", daemon=True).start()

    def now_s(self) -> float:
        with self._lock:
            return self._ticker.tick()

    def _run(self) -> None:
        while True:
            time.sleep(STEP_S)
            self.now_s()


CLOCK: Final = SteadyClock()  # started for tests; what measures in `benches/` goes without


class Watch:
    """Takes the time of its block, whatever that waits for, by a thread of its own."""

    def __init__(self) -> None:
        self._ticker = Ticker()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Watch:
        self._ticker.tick()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def elapsed_s(self) -> float:
        """What the block has taken, when it is over."""
        return self._ticker.elapsed_s

    def _run(self) -> None:
        while not self._end.wait(STEP_S):
            self._ticker.tick()
        self._ticker.tick()
