"""Comparing two revisions by what each was beside the same peer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compare import compare, ratios
from harness import Report, Series

COMPARE = Path(__file__).parents[3] / "benches" / "compare.py"


def write(path: Path, name: str, ratio: float) -> Path:
    """Write the report of a benchmark that found `ratio`."""
    report = Report(name)
    report.claim("boot", ratio, limit=1.05, unit="x")
    report.claim("to the answer", 12.0 * ratio, limit=25.0, unit="ms")
    path.write_text(report.to_json())
    return path


def test_report_tells_its_ratios_and_no_times(tmp_path: Path) -> None:
    report = Report("API")
    report.ratio(Series("vmm.ping", "us", [30.0]), Series("echo", "us", [20.0]))
    report.claim("boot", 1.02, limit=1.05, unit="x")
    report.claim("to the answer", 12.0, limit=25.0, unit="ms")
    (tmp_path / "bench-api.json").write_text(report.to_json())

    assert ratios(tmp_path) == {"API: vmm.ping / echo": 1.5, "API: boot": 1.02}


def test_only_what_both_have_is_compared() -> None:
    (change,) = compare({"a": 1.0, "b": 2.0}, {"b": 2.1, "c": 9.0})
    assert (change.name, change.before, change.after, change.is_worse) == ("b", 2.0, 2.1, False)


@pytest.mark.parametrize(("after", "status"), [(1.0, 0), (1.09, 0), (0.5, 0), (1.11, 1)])
def test_more_than_a_tenth_worse_fails(tmp_path: Path, after: float, status: int) -> None:
    paths = [write(tmp_path / "before", "Boot", 1.0), write(tmp_path / "after", "Boot", after)]
    ended = subprocess.run(
        [sys.executable, COMPARE, *paths], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == status, ended.stderr
    assert ("WORSE" in ended.stdout) == (status == 1)
    assert "to the answer" not in ended.stdout


def test_reports_without_a_common_ratio_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "old").write_text(json.dumps({"title": "Boot"}))
    ended = subprocess.run(
        [sys.executable, COMPARE, tmp_path / "old", write(tmp_path / "new", "Boot", 1.0)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
