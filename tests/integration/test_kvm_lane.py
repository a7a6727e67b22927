"""Does everything hold on KVM? Asked inside an emulated outer machine, whose KVM works whatever this one has.

What runs in there: the probe of the accelerator, a VM's life through the REST API, and the contract suite.
Each inner pytest's own summary is shown in ours. A failure ends with the last words of the inner consoles.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import pytest

from cloudvmm.guest import GuestNotBuilt, locate
from lane.image import build_image, project_archive
from lane.machine import LaneError, LaneMachine

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

BOOT_S = 90.0
SUITE_S = 300.0
READ_S = 60.0
SUMMARY = re.compile(r"^=+ (.* in [0-9.]+s.*?) =+$", re.MULTILINE)
PASSED = re.compile(r"^(\d+) passed(, \d+ deselected)? in ")
# The inner guests' consoles lie where the inner tests have their files.
SHOW_LOGS = "find /tmp/pytest-of-* -type f -name '*.log' -exec tail -n 30 -v {} +"

Tell = Callable[[str], None]


@pytest.fixture(scope="module")
def tell(request: pytest.FixtureRequest) -> Tell:
    """Write a line into pytest's report, also where the test passes."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"kvm lane: {line}")

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


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory, tell: Tell) -> Iterator[Lane]:
    try:
        guest = locate()
    except GuestNotBuilt as error:
        pytest.skip(f"The default guest is missing: {error}")
    started = time.monotonic()
    image, is_new = build_image(guest)
    project = project_archive()
    tell(f"image {'built' if is_new else 'cached'}, project packed in {time.monotonic() - started:.1f} s")
    with contextlib.closing(
        Lane(lambda: LaneMachine(image, guest, project, tmp_path_factory.mktemp("lane")), tell)
    ) as lane:
        yield lane
        lane.power_off()


def run_suite(lane: Lane, tell: Tell, arguments: str) -> None:
    """Run pytest inside; fail unless it ran at least one test, all passed and none was skipped."""
    started = time.monotonic()
    suite = f"python -m pytest -p no:cacheprovider --color=no --durations=5 --timeout=150 {arguments}"
    try:
        status, output = lane.machine.run(suite, timeout_s=SUITE_S)
    except LaneError as error:
        # Each test has a deadline of its own in there. A machine that does not even keep that stands still
        # as a whole, which is its emulator's doing: once more, on a new one.
        tell(f"{arguments}: the outer machine stands still, a new one is started\n{error}")
        lane.renew()
        status, output = lane.machine.run(suite, timeout_s=SUITE_S)
    summaries = SUMMARY.findall(output) or ["no summary"]
    tell(f"{arguments}: {summaries[-1]}, {time.monotonic() - started:.1f} s with its start")
    if status != 0:
        _, logs = lane.machine.run(SHOW_LOGS, timeout_s=READ_S)
        pytest.fail(f"{output}\n{logs}\n{lane.machine.last_words()}", pytrace=False)
    assert PASSED.match(summaries[-1]), output


# One after the other, although the machine has two processors: with two guests on KVM at the same time,
# emulated virtualisation has been seen to leave one of them hanging.


def test_kvm_is_found_and_a_vm_lives_its_whole_life_on_it(lane: Lane, tell: Tell) -> None:
    # One session for both files: under emulation each start of pytest costs seconds.
    run_suite(lane, tell, "tests/lane/inside/accelerator.py tests/lane/inside/lifecycle.py")


def test_qemu_engine_keeps_the_contract_on_kvm(lane: Lane, tell: Tell) -> None:
    run_suite(lane, tell, "tests/contract -m qemu")
