"""Pages with numbers are made of results, and what people wrote stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import page
from harness import Report, Series
from page import filled, load
from suite import BENCHES

ROOT = Path(__file__).resolve().parents[3]
PAGE = """# Performance

Prose above.
<!-- measured: boot -->
of yesterday
<!-- end of boot -->
Prose between.
<!-- measured: fork -->
kept
<!-- end of fork -->
"""


def report() -> dict[str, Any]:
    found = Report("Boot")
    ours, theirs = Series("ours", "s", [1.0, 2.0, 3.0]), Series("theirs", "s", [4.0, 4.0, 4.0])
    found.add(ours, theirs)
    found.claim("ready", 1.5, limit=1.02, unit="x")
    found.ratio(ours, theirs)
    found.bars("boot", "Boot | all", ours, theirs)
    found.chart("growth", "By RAM", "ms", along="MiB").add("ours", [(128.0, 1.0), (512.0, 2.0)])
    whole: dict[str, Any] = json.loads(found.to_json())
    return whole


def test_marked_part_is_made_of_the_result() -> None:
    text = filled(PAGE, {"boot": report()})
    assert "of yesterday" not in text
    assert "| ours | 2.000 s | 3.000 | 100% | 3 |" in text
    assert "| ready | 1.500 x | 1.020 x | does not hold |" in text
    assert "| ours / theirs | 0.50 |" in text
    assert "![Boot | all](performance/boot.svg)" in text


def test_prose_and_parts_without_a_result_stay() -> None:
    text = filled(PAGE, {"boot": report()})
    assert text.startswith("# Performance\n\nProse above.\n<!-- measured: boot -->\n")
    assert (
        "<!-- end of boot -->\nProse between.\n<!-- measured: fork -->\nkept\n<!-- end of fork -->\n" in text
    )


def test_page_made_twice_is_the_same() -> None:
    reports = {"boot": report()}
    once = filled(PAGE, reports)
    assert filled(once, reports) == once


def test_all_claims_stand_in_one_table() -> None:
    text = filled("<!-- measured: claims -->\n<!-- end of claims -->\n", {"boot": report()})
    assert "| boot | ready | 1.500 x | 1.020 x | does not hold |" in text


def test_results_are_found_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "bench-fork.json").write_text("{}")
    (tmp_path / "bench-boot.json").write_text("{}")
    assert list(load(tmp_path, ["fork", "none", "boot"])) == ["fork", "boot"]


def test_what_was_not_measured_anew_stays_as_the_page_has_it(tmp_path: Path) -> None:
    def measured(at: str) -> str:
        return json.dumps({"machine": {"at": at}})

    data = tmp_path / "docs" / "performance" / "data.json"
    data.parent.mkdir(parents=True)
    data.write_text(json.dumps({name: {"machine": {"at": "2026-02"}} for name in ("boot", "fork", "saved")}))
    (tmp_path / "bench-fork.json").write_text(measured("2026-03"))
    (tmp_path / "bench-saved.json").write_text(measured("2026-01"))

    assert {name: one["machine"]["at"] for name, one in load(tmp_path).items()} == {
        "boot": "2026-02",
        "fork": "2026-03",
        "saved": "2026-02",
    }


def test_plots_and_data_are_written(tmp_path: Path) -> None:
    import pytest

    pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install -e '.[bench]'")
    (tmp_path / "docs").mkdir()
    for path in page.PAGES:
        (tmp_path / path).write_text(PAGE)
    page.write(tmp_path, {"boot": report()})
    written = {path.name for path in (tmp_path / "docs" / "performance").iterdir()}
    assert written == {"boot.png", "boot.svg", "growth.png", "growth.svg", "data.json"}
    assert "of yesterday" not in "".join((tmp_path / path).read_text() for path in page.PAGES)
    data = json.loads((tmp_path / page.DATA).read_text())
    assert "values" not in data["boot"]["series"][0]


def test_page_has_a_place_for_every_benchmark() -> None:
    text = "".join((ROOT / path).read_text() for path in page.PAGES)
    for name in ("machine", "claims", *(bench.name for bench in BENCHES)):
        assert f"<!-- measured: {name} -->\n" in text
        assert f"<!-- end of {name} -->\n" in text


def test_tables_that_a_benchmark_makes_stand_in_place_of_its_series() -> None:
    found = Report("Settings")
    found.add(Series("boot: 2 vCPUs", "s", [2.0]))
    found.ratios["boot: 2 vCPUs, over one"] = 1.5
    found.tabulate("Boot", ("Setting", "Median"), [("2 vCPUs", "2.000 s")])
    text = filled(PAGE, {"boot": json.loads(found.to_json())})

    assert "### Boot\n\n| Setting | Median |\n|---|---|\n| 2 vCPUs | 2.000 s |\n" in text
    assert "over one" not in text
    assert "boot: 2 vCPUs" not in text
    assert "2 vCPUs  2.000 s" in found.table()
