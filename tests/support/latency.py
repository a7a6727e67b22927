"""How long API calls take, and how long they may take.

A ceiling is a net for what hangs or grew by an order, wide enough for a busy machine without KVM; it is no
benchmark (those are in `benches/`). Time in which the whole machine stood still is not counted (`watch.py`).
CLOUDVMM_LATENCY_FACTOR widens all of them, CLOUDVMM_TEST_ADOPTION_S is that of taking a VM over.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict

ADOPTION = "(adoption)"
ADOPTED_WITHIN_S = 1.0
READ_CEILING_S = 1.0
CHANGE_CEILING_S = 5.0
CEILINGS_S = {
    "vm.boot": 20.0,
    "vm.reboot": 20.0,
    "vm.coredump": 60.0,
    "vm.shutdown": 10.0,
    "vm.delete": 10.0,
    "vmm.shutdown": 10.0,
    # From the start of a manager to its first answer, and what the clock of its guest did meanwhile.
    **dict.fromkeys(("(start without a VM)", "(clock gap, killed)", "(clock gap, spared)"), 60.0),
    # On a machine that has nothing else to do, 1.
    ADOPTION: float(os.environ.get("CLOUDVMM_TEST_ADOPTION_S", "60")),
}
READS = ("vmm.ping", "vm.info", "vm.counters")


class LatencyLog:
    """Every call of a test run: engine and command to seconds."""

    def __init__(self) -> None:
        self._factor = float(os.environ.get("CLOUDVMM_LATENCY_FACTOR", "1"))
        self._calls: dict[tuple[str, str], list[float]] = defaultdict(list)

    def record(self, engine_name: str, command: str, elapsed_s: float) -> None:
        """:raises AssertionError: the call took longer than its ceiling."""
        self._calls[engine_name, command].append(elapsed_s)
        limit_s = ceiling_s(command) * self._factor
        assert elapsed_s <= limit_s, (
            f"{command} took {elapsed_s:.3f} s, more than its ceiling of {limit_s:g} s"
        )

    def calls(self) -> list[tuple[str, str, list[float]]]:
        """Everything that was recorded, for another's `add`."""
        return [(engine, command, times) for (engine, command), times in self._calls.items()]

    def add(self, calls: list[tuple[str, str, list[float]]]) -> None:
        """Take in what another log has recorded."""
        for engine, command, times in calls:
            self._calls[engine, command] += times

    def report(self) -> list[str]:
        """One line per engine and command, and one on how many VMs were taken over within a second."""
        lines = [
            f"{engine:6} {command:28} n={len(times):<5} p50={statistics.median(times) * 1000:9.2f} ms"
            f"  p99={_p99(times) * 1000:9.2f} ms  max={max(times) * 1000:9.2f} ms"
            f"  ceiling={ceiling_s(command) * self._factor:g} s"
            for (engine, command), times in sorted(self._calls.items())
        ]
        for (engine, command), times in sorted(self._calls.items()):
            if command == ADOPTION:
                count = sum(seconds <= ADOPTED_WITHIN_S for seconds in times)
                lines.append(f"{engine:6} {command:28} {count} of {len(times)} within {ADOPTED_WITHIN_S:g} s")
        return lines


def _p99(times: list[float]) -> float:
    return sorted(times)[(len(times) * 99 - 1) // 100]


def ceiling_s(command: str) -> float:
    return CEILINGS_S.get(command, READ_CEILING_S if command in READS else CHANGE_CEILING_S)
