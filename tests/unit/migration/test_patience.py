from __future__ import annotations

import pytest

from cloudvmm.migration import patience
from cloudvmm.migration.patience import SERVED_S, LostAgain, Patience

LIMIT_S = 120.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


def lose_after(waiting: Patience, clock: Clock, served_s: float, *, pause_s: float = 0.0) -> None:
    waiting.begin()
    clock.now_s += served_s
    waiting.lose(OSError("Cut"))
    clock.now_s += pause_s


def test_connection_that_does_not_serve_is_given_up_in_time(clock):
    waiting = Patience(LIMIT_S)
    lose_after(waiting, clock, 500.0, pause_s=100.0)
    lose_after(waiting, clock, 1.0, pause_s=18.9)

    with pytest.raises(LostAgain, match="again and again for 120 s") as lost:
        lose_after(waiting, clock, 0.2)
    assert str(lost.value.__cause__) == "Cut"


def test_connection_that_has_served_is_another_beginning(clock):
    waiting = Patience(LIMIT_S)
    for _ in range(100):
        lose_after(waiting, clock, SERVED_S, pause_s=100.0)
