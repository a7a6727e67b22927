"""Waiting for an event or a condition, never for time alone.

A host that stands still uses up little of the patience: `watch.py`.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

from cloudvmm.engine.base import EngineEvent, Machine
from support.watch import Ticker

POLL_EVERY_S = 0.02
LONGEST_LOOK_S = 1.0  # that a condition may take, and be counted for


def wait_until(condition: Callable[[], Any], what: str, *, timeout_s: float) -> Any:
    """Return the first true answer of `condition`; fail with `what` was waited for if none comes in time."""
    ticker = Ticker(longest_step_s=LONGEST_LOOK_S)
    while not (answer := condition()):
        if ticker.tick() > timeout_s:
            raise AssertionError(f"Not within {timeout_s} s: {what}")
        time.sleep(POLL_EVERY_S)
    return answer


def wait_event(machine: Machine, kind: type, *, timeout_s: float) -> list[EngineEvent]:
    """Poll the machine until an event of `kind` comes; return all events up to and with it."""
    ticker = Ticker(longest_step_s=LONGEST_LOOK_S)
    events: list[EngineEvent] = []
    while not any(isinstance(event, kind) for event in events):
        if ticker.tick() > timeout_s:
            raise AssertionError(f"No {kind.__name__} within {timeout_s} s, only {events}")
        if is_readable(machine.fileno(), timeout_s=POLL_EVERY_S):
            events += machine.take_events()
    return events


def is_readable(fd: int, *, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
