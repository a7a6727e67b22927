from __future__ import annotations

import threading

import pytest

from support.deadline import HOST_S
from support.watch import LONGEST_STEP_S, Ticker, Watch


def test_steps_add_up() -> None:
    readings = iter([5.0, 5.02, 5.05])
    ticker = Ticker(lambda: next(readings))
    ticker.tick()
    assert ticker.tick() == pytest.approx(0.05)


def test_a_host_that_stood_still_counts_little() -> None:
    readings = iter([5.0, 5.02, 9.02])
    ticker = Ticker(lambda: next(readings))
    ticker.tick()
    assert ticker.tick() == pytest.approx(0.02 + LONGEST_STEP_S)


def test_a_watch_goes_on_while_its_block_waits() -> None:
    with Watch() as watch:
        while watch.elapsed_s < 2 * LONGEST_STEP_S:
            threading.Event().wait(LONGEST_STEP_S)
    assert watch.elapsed_s < HOST_S
