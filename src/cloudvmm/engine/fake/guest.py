"""The guest as its author plays it: what it saw, and what it does next. Public, as `machine.guest`.

Left alone, the guest prints its ready line, echoes lines (`console.py`), only records what is pressed, and
does at once what it is asked for: it lets go of devices and vCPUs, and follows its balloon and its memory
zones. Told to `refuse`, it keeps a request until it is told to `obey`; so it does while it is paused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from cloudvmm.engine.base import EngineEvent, GuestPanicked, PoweredOff, ResetRequested

RequestKind = Literal["device", "driver", "vcpus", "balloon", "zone"]
PanicKind = Literal["panic", "crash_loaded", "unknown_event"]


class PressSeen(msgspec.Struct, frozen=True, kw_only=True):
    """How often the guest noticed the power button and a non-maskable interrupt."""

    power_button: int
    nmi: int


class FakeGuest:
    """Any thread may play it. Its lock is the machine's, so all that happens to both has one order."""

    def __init__(
        self, tell: Callable[[EngineEvent], None], lock: threading.RLock, *, honours_power_button: bool
    ) -> None:
        self._tell = tell
        self._lock = lock
        self._honours_power_button = honours_power_button
        self._seen = {"power_button": 0, "nmi": 0}
        self._unseen: list[str] = []
        self._refused: set[RequestKind] = set()
        self._asked: dict[tuple[RequestKind, str], tuple[Callable[[], None], int]] = {}
        self._ran_s = 0.0
        self._woke_at_s: float | None = None

    @property
    def is_awake(self) -> bool:
        """Its vCPUs run."""
        return self._woke_at_s is not None

    @property
    def tick(self) -> int:
        """Milliseconds that the guest has run; stands still while it is paused or off."""
        with self._lock:
            since_s = 0.0 if self._woke_at_s is None else time.monotonic() - self._woke_at_s
            return int((self._ran_s + since_s) * 1000)

    def press_seen(self) -> PressSeen:
        """Tell what the guest saw. What is pressed while it is paused is seen when it runs again."""
        with self._lock:
            return PressSeen(power_button=self._seen["power_button"], nmi=self._seen["nmi"])

    def power_off(self) -> None:
        """Switch off, as `poweroff` does: `PoweredOff`, and the guest stands still.

        :raises EngineError: the guest does not run.
        """
        self._tell(PoweredOff())

    def reset(self, *, by_watchdog: bool = False) -> None:
        """Ask for a reset, as `reboot` does: `ResetRequested`, and the guest stands still.

        :raises EngineError: the guest does not run.
        """
        self._tell(ResetRequested(by_watchdog=by_watchdog))

    def panic(self, kind: PanicKind = "panic") -> None:
        """Speak through the panic device: `GuestPanicked`, and the guest goes on.

        :raises EngineError: the guest does not run.
        """
        self._tell(GuestPanicked(kind=kind))

    def refuse(self, *kinds: RequestKind) -> None:
        """From here on leave requests of `kinds` undone; the newest of each is kept for `obey`."""
        with self._lock:
            self._refused.update(kinds)

    def obey(self, *kinds: RequestKind) -> None:
        """From here on do what requests of `kinds` ask for, those that wait included."""
        with self._lock:
            self._refused.difference_update(kinds)
            self._do_asked()

    def memory(self) -> tuple[int, dict[str, int], list[str]]:
        """The machine's: how many milliseconds it has run, what it has seen, and what it will see."""
        with self._lock:
            return self.tick, dict(self._seen), list(self._unseen)

    def remember(self, tick_ms: int, seen: dict[str, int], unseen: list[str]) -> None:
        """The machine's: go on, asleep, where another guest's `memory` ends."""
        with self._lock:
            self._ran_s = tick_ms / 1000
            self._seen |= seen
            self._unseen = list(unseen)

    def wake(self) -> None:
        """The machine's: the vCPUs run from here on."""
        with self._lock:
            if self._woke_at_s is None:
                self._woke_at_s = time.monotonic()
            unseen, self._unseen = self._unseen, []
            for what in unseen:
                self.notice(what)
            self._do_asked()

    def sleep(self) -> None:
        """The machine's: the vCPUs stand still from here on."""
        with self._lock:
            if self._woke_at_s is not None:
                self._ran_s += time.monotonic() - self._woke_at_s
                self._woke_at_s = None

    def notice(self, what: str) -> None:
        """The machine's: `what` is pressed; a sleeping guest notices it when it wakes."""
        with self._lock:
            if not self.is_awake:
                self._unseen.append(what)
                return
            self._seen[what] += 1
            if what == "power_button" and self._honours_power_button:
                self.power_off()

    def ask(self, kind: RequestKind, what: str, act: Callable[[], None], *, amount: int = 0) -> None:
        """The machine's: the guest is to `act`. A later request about the same replaces one that waits.

        `amount` is kept for whoever asks another guest the same again.
        """
        with self._lock:
            self._asked[kind, what] = act, amount
            self._do_asked()

    def waiting(self) -> list[tuple[RequestKind, str, int]]:
        """The machine's: what was asked and is not done, with its amount."""
        with self._lock:
            return [(kind, what, amount) for (kind, what), (_, amount) in self._asked.items()]

    def _do_asked(self) -> None:
        if not self.is_awake:
            return
        for key in [key for key in self._asked if key[0] not in self._refused]:
            act, _ = self._asked.pop(key)
            act()
