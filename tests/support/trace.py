"""A trace that `--trace` wrote, as a test looks at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

SLACK_US = 0.01  # times are floating-point numbers


class Span(NamedTuple):
    row: str
    name: str
    begun_us: float
    ended_us: float
    error: str | None

    @property
    def took_us(self) -> float:
        return self.ended_us - self.begun_us

    def holds(self, other: Span) -> bool:
        begins, ends = other.begun_us >= self.begun_us - SLACK_US, other.ended_us <= self.ended_us + SLACK_US
        return begins and ends

    def is_beside(self, other: Span) -> bool:
        return other.begun_us >= self.ended_us - SLACK_US or other.ended_us <= self.begun_us + SLACK_US


class Trace:
    """:raises ValueError: the file is no JSON."""

    def __init__(self, path: Path) -> None:
        self.events = json.loads(path.read_text())
        named = [event for event in self.events if event["name"] == "thread_name"]
        names = {event["tid"]: event["args"]["name"] for event in named}
        self.spans = [
            Span(
                names[event["tid"]],
                event["name"],
                event["ts"],
                event["ts"] + event["dur"],
                event["args"].get("error"),
            )
            for event in self.events
            if event["ph"] == "X"
        ]
        self._tids = [event["tid"] for event in self.events if event["ph"] == "X"]

    def one(self, name: str) -> Span:
        (span,) = [span for span in self.spans if span.name == name]
        return span

    def inside(self, parent: Span) -> list[Span]:
        """Return what `parent` is made of on its row, without what those are made of."""
        held = [
            one for one in self.spans if one is not parent and one.row == parent.row and parent.holds(one)
        ]
        return [one for one in held if not any(other is not one and other.holds(one) for other in held)]

    def tangled(self) -> list[tuple[Span, Span]]:
        """Return the pairs of a thread that are neither one in the other nor one after the other."""
        rows: dict[int, list[Span]] = {}
        for tid, span in zip(self._tids, self.spans, strict=True):
            rows.setdefault(tid, []).append(span)
        return [
            (one, other)
            for spans in rows.values()
            for number, one in enumerate(spans)
            for other in spans[number + 1 :]
            if not (one.holds(other) or other.holds(one) or one.is_beside(other))
        ]
