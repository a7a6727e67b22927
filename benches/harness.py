"""What every benchmark shares: series of numbers, what is said about them, and how that is printed and kept.

A benchmark prints; it never passes or fails. Its own arithmetic is tested in `tests/unit/benches`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RATIO = "x"  # the unit of what was measured beside a peer in the same run
PEER_FACT = "peer"  # among the facts about the machine: what Cloud Hypervisor calls itself
COLUMNS = ("series", "unit", "n", "median", "p99", "min", "max", "spread")


class Series:
    """Numbers of one kind, in the order in which they were measured."""

    def __init__(self, name: str, unit: str, values: Iterable[float] = ()) -> None:
        self.name = name
        self.unit = unit
        self.values = list(values)

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def p99(self) -> float:
        """The smallest value that at least 99 of 100 do not exceed; the largest where there are fewer."""
        return percentile(self.values, 99)

    @property
    def spread(self) -> float:
        """The distance of the quartiles as a share of the median: how far to trust the median."""
        if len(self.values) < 2 or self.median == 0:
            return 0.0
        return (percentile(self.values, 75) - percentile(self.values, 25)) / abs(self.median)

    def summary(self) -> dict[str, Any]:
        return {
            "series": self.name,
            "unit": self.unit,
            "n": len(self.values),
            "median": self.median,
            "p99": self.p99,
            "min": min(self.values),
            "max": max(self.values),
            "spread": self.spread,
        }


class Claim:
    """A number that we hold ourselves to, beside what was measured. `limit` is in the unit of the value."""

    def __init__(self, name: str, value: float, limit: float, unit: str) -> None:
        self.name = name
        self.value = value
        self.limit = limit
        self.unit = unit

    @property
    def holds(self) -> bool:
        return self.value <= self.limit

    def summary(self) -> dict[str, Any]:
        return {
            "claim": self.name,
            "value": self.value,
            "limit": self.limit,
            "unit": self.unit,
            "holds": self.holds,
        }


class Chart:
    """A picture to be drawn: `lines` over the numbers of `along`, or bars of one value each without it."""

    def __init__(self, name: str, title: str, unit: str, *, along: str | None) -> None:
        self.name = name
        self.title = title
        self.unit = unit
        self.along = along
        self.lines: dict[str, list[tuple[float, float]]] = {}

    def add(self, label: str, points: Iterable[tuple[float, float]]) -> None:
        """Add a line of points (x, value)."""
        self.lines[label] = list(points)

    def bar(self, series: Series) -> None:
        self.lines[series.name] = [(0.0, series.median)]

    def summary(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "along": self.along,
            "lines": self.lines,
        }


class Report:
    """All that one benchmark found, as a table and as JSON."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.machine = machine_facts()
        self.series: list[Series] = []
        self.claims: list[Claim] = []
        self.ratios: dict[str, float] = {}
        self.notes: list[str] = []
        self.charts: list[Chart] = []
        self.tables: list[dict[str, Any]] = []

    def add(self, *series: Series) -> None:
        self.series += series

    def claim(self, name: str, value: float, *, limit: float, unit: str) -> None:
        self.claims.append(Claim(name, value, limit, unit))
        if unit == RATIO:
            self.ratios[name] = value

    def ratio(self, ours: Series, theirs: Series) -> None:
        """Tell how many times `theirs` the median of `ours` is; nobody has promised anything of it."""
        name = f"{ours.name} / {theirs.name}"
        self.ratios[name] = ratio(ours, theirs)
        self.note(f"{name}: {self.ratios[name]:.2f}")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def chart(self, name: str, title: str, unit: str, *, along: str | None = None) -> Chart:
        """Return a new chart, to be filled; `name` is its file's. `along` says what is on the x axis."""
        self.charts.append(Chart(name, title, unit, along=along))
        return self.charts[-1]

    def bars(self, name: str, title: str, *series: Series) -> None:
        """Have the medians of `series`, which share a unit, drawn beside each other."""
        chart = self.chart(name, title, series[0].unit)
        for one in series:
            chart.bar(one)

    def tabulate(self, title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Tell `rows` in a table of their own; a page shows such tables in place of series and ratios."""
        self.tables.append({"title": title, "head": list(head), "rows": [list(row) for row in rows]})

    def table(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        lines = [f"# {self.title}", f"# {facts}", ""]
        lines += format_rows([COLUMNS, *(_series_row(series) for series in self.series)])
        if self.claims:
            lines += ["", *format_rows([("claim", "measured", "limit", ""), *map(_claim_row, self.claims)])]
        for one in self.tables:
            lines += ["", f"# {one['title']}", *format_rows([one["head"], *one["rows"]])]
        return "\n".join([*lines, *self.notes, ""])

    def to_json(self) -> str:
        whole = {
            "title": self.title,
            "machine": self.machine,
            "series": [{**series.summary(), "values": series.values} for series in self.series],
            "claims": [claim.summary() for claim in self.claims],
            "ratios": self.ratios,
            "notes": self.notes,
            "charts": [chart.summary() for chart in self.charts],
            "tables": self.tables,
        }
        return json.dumps(whole, indent=1)

    def publish(self, json_path: str | None) -> None:
        """Print the table; write the JSON to `json_path`, if any."""
        print(self.table(), flush=True)
        if json_path is not None:
            Path(json_path).write_text(self.to_json())


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: always one of `values`, never a number between two."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, int(rank) - 1)]


def ratio(ours: Series, theirs: Series) -> float:
    """Return how many times `theirs` the median of `ours` is."""
    return ours.median / theirs.median


def paired_ratio(ours: Series, theirs: Series) -> float:
    """Return the median of the ratios of the pairs, in the order of measuring.

    For series that took turns: what slowed one turn down slowed both, and goes away.
    """
    return statistics.median(our / their for our, their in zip(ours.values, theirs.values, strict=True))


def difference(ours: Series, theirs: Series, name: str) -> Series:
    """Return the pairwise differences as a series."""
    pairs = zip(ours.values, theirs.values, strict=True)
    return Series(name, ours.unit, [our - their for our, their in pairs])


def machine_facts() -> dict[str, str]:
    """Say what these numbers were measured on, and how busy it was."""
    return {
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": _qemu_version(),
        "load": f"{os.getloadavg()[0]:.2f}",
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def bench_parser(doc: str | None, *, runs: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument(
        "--runs", type=int, default=runs, help="how often each thing is measured (%(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured to FILE")
    return parser


def add_peer_option(parser: argparse.ArgumentParser) -> None:
    """For what needs no guest: the real Cloud Hypervisor can take its turns, too."""
    parser.add_argument(
        "--cloud-hypervisor", metavar="PATH", help="measure this Cloud Hypervisor (a release build) beside it"
    )


def note_peer(report: Report, binary: str | None) -> None:
    """Have the report say which Cloud Hypervisor was measured beside, if any."""
    if binary is not None:
        answer = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
        report.machine[PEER_FACT] = answer.stdout.partition("\n")[0]


def format_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Line the columns up: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _series_row(series: Series) -> list[str]:
    summary = series.summary()
    numbers = [format_number(summary[name]) for name in ("median", "p99", "min", "max")]
    return [series.name, series.unit, str(summary["n"]), *numbers, f"{summary['spread']:.0%}"]


def _claim_row(claim: Claim) -> list[str]:
    verdict = "holds" if claim.holds else "DOES NOT HOLD"
    return [claim.name, f"{format_number(claim.value)} {claim.unit}", format_number(claim.limit), verdict]


def format_number(value: float) -> str:
    """Four digits that matter, never an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 3 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else 4
    return f"{value:.{digits}f}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _qemu_version() -> str:
    binary = shutil.which("qemu-system-x86_64")
    if binary is None:
        return "none"
    words = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return words[3] if len(words) > 3 else "unknown"
