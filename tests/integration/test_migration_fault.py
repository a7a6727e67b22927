"""Whatever fails on the way from one VMM to another, at whatever moment: the VM runs once, and is not lost.

The faults are in tests/support/fault.py, and what must hold in tests/support/rounds.py. The first test is a
sample; the others are for `--long`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fault import faults_for
from support.rounds import Rounds

LAST_MOMENT_S = {"fake": 0.02, "qemu": 0.5}


@pytest.fixture
def rounds_of(tmp_path: Path) -> Iterator:
    made: list[Rounds] = []

    def make(engine: str, seed: int) -> Rounds:
        made.append(Rounds(tmp_path, engine, seed, last_moment_s=LAST_MOMENT_S[engine]))
        return made[-1]

    yield make
    for rounds in made:
        rounds.close()


def strike(rounds: Rounds, engine: str, count: int) -> None:
    faults = faults_for(engine)
    for fault in itertools.islice(itertools.cycle(faults), count):
        rounds.strike(fault)
    print(*(f"{count} {outcome}" for outcome, count in sorted(rounds.outcomes.items())), sep="\n")
    assert any(outcome.startswith("stayed") for outcome in rounds.outcomes)
    assert any(outcome.startswith("moved") for outcome in rounds.outcomes)


def test_each_fault_once(rounds_of) -> None:
    strike(rounds_of("fake", 1), "fake", len(faults_for("fake")))


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(7))
def test_fifty_faults(rounds_of, seed: int) -> None:
    strike(rounds_of("fake", 100 + seed), "fake", 50)


@pytest.mark.long
@pytest.mark.qemu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(6))
def test_twenty_five_faults_on_qemu(rounds_of, seed: int) -> None:
    strike(rounds_of("qemu", 200 + seed), "qemu", 25)
