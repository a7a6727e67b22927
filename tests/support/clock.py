"""What a guest sees of its own clock while its manager is killed, and while another one is.

A loop in the guest reads the clock without end and writes down each time that this took 30 ms or more, in
hundredths of a second, as the guest's kernel tells it. What the guest cannot see, because its clock stood
still, too, is seen from outside: by how much that clock fell behind the host's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from support.server import Server
from support.survivor import Survivor
from support.vm import choose_engine

_TICKS_PER_S = 100
_SETTLED_TICKS = 10  # in which the shell that has read the clock gives the processor back
_LOOP = """
last=
while read up _ < /proc/uptime; do
    now=${up%.*}${up#*.}
    if [ -n "$last" ] && [ $((now - last)) -ge 3 ]; then echo $now $((now - last)) >> /tmp/gaps; fi
    last=$now
done
"""


class Look(msgspec.Struct, frozen=True):
    """A reading of the guest's clock, between `before_s` and `after_s` of the host's.

    `gaps` are those since the last look: when one ended, and how long it was.
    """

    ticks: int
    before_s: float
    after_s: float
    gaps: list[tuple[int, int]]


class Window(msgspec.Struct, frozen=True):
    """`gap_s` is the longest time for which the guest did not run, by its own clock.

    `behind_s` is how far, at least, that clock fell behind the host's.
    """

    gap_s: float
    behind_s: float


class GuestClock:
    """Starts the loop in the guest of `survivor`; `close` ends it."""

    def __init__(self, survivor: Survivor) -> None:
        self._survivor = survivor
        survivor.ask(f"cat > /tmp/clock.sh <<'end'\n{_LOOP}end\n: > /tmp/gaps")
        survivor.ask("sh /tmp/clock.sh >/dev/null 2>&1 & echo $! > /tmp/clock.pid")

    def during(self, what: Callable[[], None]) -> Window:
        """Return what the clock did while `what` was done."""
        first = self._look()
        what()
        last = self._look()
        since = first.ticks + _SETTLED_TICKS
        gaps = [gap for at, gap in last.gaps if since <= at <= last.ticks]
        guest_s = (last.ticks - first.ticks) / _TICKS_PER_S
        return Window(
            gap_s=max(gaps, default=0) / _TICKS_PER_S,
            behind_s=last.before_s - first.after_s - guest_s,
        )

    def close(self) -> None:
        self._survivor.ask("kill $(cat /tmp/clock.pid); rm /tmp/clock.* /tmp/gaps")

    def _look(self) -> Look:
        before_s = time.monotonic()
        lines = self._survivor.ask("cat /proc/uptime /tmp/gaps; : > /tmp/gaps").splitlines()
        after_s = time.monotonic()
        ticks = int(lines[0].split()[0].replace(".", ""))
        gaps = [(int(at), int(gap)) for at, gap in (line.split() for line in lines[1:])]
        return Look(ticks, before_s, after_s, gaps)


class Bystander:
    """A manager without a VM, to be killed in the place of a guest's: for the host it is as much work."""

    def __init__(self, home: Path) -> None:
        engine = choose_engine("qemu")
        self._server = Server(home / "bystander", [*engine.flags, "--state-dir", str(home / "empty")])
        self._server.wait_ready()
        self.starts_s: list[float] = []

    def replace_manager(self) -> None:
        self._server.kill()
        self.starts_s.append(self._server.restart())

    def close(self) -> None:
        self._server.check_end()
