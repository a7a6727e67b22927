"""How a lane runs: its machine is booted, tests run in it, their outcome is told. No test lives here."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable

import pytest

from lane.machine import LaneError, LaneMachine

BOOT_S = 90.0
SUITE_S = 600.0
MACHINES = 3
PATIENCE = "CLOUDVMM_TEST_BOOT_S=60"  # on KVM a guest is there in three seconds, or not at all
READ_S = 60.0
SUMMARY = re.compile(r"^=+ (.* in [0-9.]+s.*?) =+$", re.MULTILINE)
# A guest on emulated KVM that has not come up, beside another or alone: it says nothing at all.
MUTE = "No shell service: b''"
PASSED = re.compile(r"^(\d+) passed(, \d+ deselected)? in ")
# The inner guests' consoles lie where the inner tests have their files.
KEPT_LOGS = "-name '*.log' -o -name '*.stderr' -o -name events"
SHOW_LOGS = f"find /tmp/pytest-of-* -type f '(' {KEPT_LOGS} ')' -exec tail -n 30 -v {{}} +"

Tell = Callable[[str], None]


def teller(config: pytest.Config, name: str) -> Tell:
    """Return what writes a line of the lane `name` into pytest's report, also where the test passes."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    assert reporter is not None and capture is not None

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"{name} lane: {line}")

    return write


class Lane:
    """The outer machine, booted, with its /dev/kvm; a new one after `renew`."""

    def __init__(self, start: Callable[[], LaneMachine], tell: Tell) -> None:
        self._start = start
        self._tell = tell
        self._stack = contextlib.ExitStack()
        self.machine = self._booted()

    def renew(self) -> None:
        self._stack.close()
        self.machine = self._booted()

    def power_off(self) -> None:
        self.machine.power_off(timeout_s=30)

    def close(self) -> None:
        self._stack.close()

    def _booted(self) -> LaneMachine:
        started = time.monotonic()
        machine = self._stack.enter_context(self._start())
        machine.wait_ready(timeout_s=BOOT_S)
        self._tell(f"booted in {time.monotonic() - started:.1f} s")
        return machine


def run_suite(lane: Lane, tell: Tell, arguments: str, *, environment: str = "") -> None:
    """Run pytest inside, with the variables in `environment`.

    Fail unless it ran at least one test, all passed and none was skipped.
    """
    started = time.monotonic()
    pytest_inside = "python -m pytest -p no:cacheprovider --color=no --durations=5 --timeout=300"
    suite = f"{PATIENCE} {environment} {pytest_inside} {arguments}"
    for left in reversed(range(MACHINES)):
        try:
            status, output = lane.machine.run(suite, timeout_s=SUITE_S)
        except LaneError as error:
            # Each test has a deadline of its own in there. A machine that does not even keep that stands
            # still as a whole, which is its emulator's doing, as is a guest that does.
            if not left:
                raise
            status, output = None, str(error)
        if status == 0 or (status is not None and MUTE not in output) or not left:
            break
        tell(f"{arguments}: a machine stands still, a new one is started\n{output}")
        lane.renew()
    summaries = SUMMARY.findall(output) or ["no summary"]
    tell(f"{arguments}: {summaries[-1]}, {time.monotonic() - started:.1f} s with its start")
    if status != 0:
        _, logs = lane.machine.run(SHOW_LOGS, timeout_s=READ_S)
        pytest.fail(f"{output}\n{logs}\n{lane.machine.last_words()}", pytrace=False)
    assert PASSED.match(summaries[-1]), output
