"""Managers killed at seeded moments of every command: no guest is lost or stands still."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.attack import has_interface
from support.clock import Bystander, GuestClock, Window
from support.device.fs import virtiofsd_program
from support.latency import ADOPTION, LatencyLog
from support.qemu import find_qemu
from support.shared import Shared, shared
from support.striker import INTERFACE, MOST_VCPUS, ZONE, Hoarder, Striker
from support.survivor import Lives, Survivor, surviving

pytestmark = [pytest.mark.qemu, pytest.mark.root, pytest.mark.timeout(1800)]

# A long run kills over 1,000 managers: 600 in any command, 210 while VMs come and go, and 60 each beside a
# guest's clock, at a start, on the oldest QEMU and in what is for good. `test_adoption_step.py` adds to them.
SEED = 1000
LONGEST_GAP_S = 0.1
PART = 150
PARTS = 4
KILLS = [3, *(pytest.param(PART, marks=pytest.mark.long, id=f"{PART}-part{part}") for part in range(PARTS))]
HOARDED = [pytest.param(60, marks=pytest.mark.long)]
OLD_KILLS = [pytest.param(60, marks=pytest.mark.long)]
STARTS = [pytest.param(60, marks=pytest.mark.long)]
LIVES = [1, pytest.param(30, marks=pytest.mark.long)]
WINDOWS = [pytest.param(60, marks=pytest.mark.long)]  # a few of them tell nothing
OF_LIVES = ("vm.create", "vm.boot", "vm.reboot", "vm.power-button", "vm.shutdown", "vm.boot", "vm.delete")


MEMORY = {"size": 0, "hotplug_method": "VirtioMem", "zones": [ZONE]}
# QEMU before 10.1 loses interrupts of emulated vCPUs that run side by side while devices come, which has
# nothing to do with kills. These take turns; vCPUs that come and go are the Hoarder's.
TURNING_VCPUS = {"boot_vcpus": 2, "max_vcpus": 2}


@pytest.fixture(scope="module", autouse=True)
def has_virtiofsd() -> Iterator[bool]:
    """Whether managers find a virtiofsd; without one no file system is added."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            folder = os.path.dirname(virtiofsd_program())
        except pytest.skip.Exception:
            yield False
        else:
            patch.setenv("PATH", f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{folder}")
            yield True


@shared()
def shared_survivor(tmp_path_factory: pytest.TempPathFactory, has_virtiofsd: bool) -> Iterator[Survivor]:
    with surviving(tmp_path_factory.mktemp("survivor"), SEED, memory=MEMORY, cpus=TURNING_VCPUS) as found:
        yield found


@pytest.fixture
def survivor(
    shared_survivor: Shared[Survivor], request: pytest.FixtureRequest, latency: LatencyLog
) -> Iterator[Survivor]:
    found = shared_survivor.lend(request)
    yield found
    report(found, latency)


def report(survivor: Survivor | Lives, latency: LatencyLog) -> None:
    """Have the report of the run tell how long it took from a manager's start to its first answer."""
    for seconds in survivor.adoptions_s:
        latency.record("qemu", ADOPTION, seconds)
    survivor.adoptions_s.clear()


def strike(survivor: Survivor, kills: int, *, has_virtiofsd: bool) -> None:
    striker = Striker(survivor, has_virtiofsd=has_virtiofsd)
    for _ in range(kills):
        striker.strike()
    striker.settle()
    assert not has_interface(INTERFACE)
    assert not os.path.lexists(survivor.booted.folder / "vsock")
    assert [*survivor.state.glob("helper-*.pid"), *survivor.state.glob("socket-*")] == []


@pytest.mark.parametrize("kills", KILLS)
def test_kill_in_any_command_loses_no_guest(survivor: Survivor, kills: int, has_virtiofsd: bool) -> None:
    strike(survivor, kills, has_virtiofsd=has_virtiofsd)


@pytest.mark.parametrize("kills", HOARDED)
def test_kill_in_what_a_guest_is_given_for_good_loses_neither(
    kills: int, tmp_path: Path, latency: LatencyLog
) -> None:
    cpus = {"boot_vcpus": 1, "max_vcpus": MOST_VCPUS}
    with surviving(tmp_path, SEED, cpus=cpus) as survivor:
        hoarder = Hoarder(survivor)
        for _ in range(kills):
            hoarder.strike()
        hoarder.settle()
        report(survivor, latency)


@pytest.mark.parametrize("rounds", STARTS)
def test_kill_of_a_manager_that_is_about_to_take_over_loses_nothing(
    survivor: Survivor, rounds: int, has_virtiofsd: bool
) -> None:
    striker = Striker(survivor, has_virtiofsd=has_virtiofsd)
    for _ in range(rounds):
        striker.strike()
        survivor.strike_starts()
    striker.settle()


@pytest.mark.parametrize("kills", OLD_KILLS)
def test_guest_of_the_oldest_qemu_is_not_lost_either(
    kills: int, tmp_path: Path, latency: LatencyLog, has_virtiofsd: bool
) -> None:
    qemu = find_qemu("7.2", tmp_path)
    with surviving(tmp_path, SEED, "--qemu", qemu, memory=MEMORY, cpus=TURNING_VCPUS) as survivor:
        strike(survivor, kills, has_virtiofsd=has_virtiofsd)
        report(survivor, latency)


@pytest.mark.parametrize("rounds", LIVES)
def test_kill_while_a_vm_comes_and_goes_leaves_it_whole_or_nothing(
    tmp_path: Path, rounds: int, latency: LatencyLog
) -> None:
    lives = Lives(tmp_path, SEED)
    for _ in range(rounds):
        for command in OF_LIVES:
            lives.strike(command)
    lives.close()
    report(lives, latency)


@pytest.mark.parametrize("windows", WINDOWS)
def test_clock_of_a_guest_stands_still_no_longer_than_where_another_manager_is_killed(
    survivor: Survivor, windows: int, tmp_path: Path, latency: LatencyLog
) -> None:
    """A host that is busy lets an emulated guest wait whatever its manager does: so the two are compared."""
    with (
        contextlib.closing(Bystander(tmp_path)) as bystander,
        contextlib.closing(GuestClock(survivor)) as clock,
    ):
        killed: list[Window] = []
        spared: list[Window] = []
        for _ in range(windows):
            killed.append(clock.during(survivor.replace_manager))
            spared.append(clock.during(bystander.replace_manager))
    for name, found in (("killed", killed), ("spared", spared)):
        for window in found:
            latency.record("qemu", f"(clock gap, {name})", window.gap_s)
    for seconds in bystander.starts_s:
        latency.record("qemu", "(start without a VM)", seconds)

    usual_s = statistics.median(window.gap_s for window in spared)
    assert statistics.median(window.gap_s for window in killed) <= max(LONGEST_GAP_S, 3 * usual_s)
    assert min(window.behind_s for window in killed) < LONGEST_GAP_S
    survivor.settle()
