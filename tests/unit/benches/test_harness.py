from __future__ import annotations

import json

import pytest

from harness import Report, Series, difference, format_number, format_rows, paired_ratio, percentile, ratio


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 99, 7.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([float(number) for number in range(1, 101)], 99, 99.0),
        ([float(number) for number in range(1, 101)], 100, 100.0),
        ([float(number) for number in range(1, 11)], 99, 10.0),
        ([float(number) for number in range(1, 11)], 0, 1.0),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_summary_of_a_series() -> None:
    summary = Series("boot", "ms", [4.0, 1.0, 3.0, 2.0]).summary()
    assert summary == {
        "series": "boot",
        "unit": "ms",
        "n": 4,
        "median": 2.5,
        "p99": 4.0,
        "min": 1.0,
        "max": 4.0,
        "spread": (3.0 - 1.0) / 2.5,
    }


def test_series_of_one_has_no_spread() -> None:
    assert Series("boot", "ms", [4.0]).spread == 0.0


def test_ratio_is_of_the_medians() -> None:
    assert ratio(Series("a", "s", [3.0, 1.0, 100.0]), Series("b", "s", [2.0, 2.0, 2.0])) == 1.5


def test_paired_ratio_forgets_what_slowed_a_whole_turn_down() -> None:
    ours, theirs = Series("a", "s", [2.0, 20.0, 4.0]), Series("b", "s", [1.0, 10.0, 1.0])
    assert paired_ratio(ours, theirs) == 2.0


def test_paired_ratio_of_series_of_different_length_is_refused() -> None:
    with pytest.raises(ValueError):
        paired_ratio(Series("a", "s", [1.0]), Series("b", "s", [1.0, 2.0]))


def test_difference_keeps_pairs_and_unit() -> None:
    found = difference(Series("a", "ms", [5.0, 7.0]), Series("b", "ms", [1.0, 9.0]), "a - b")
    assert (found.name, found.unit, found.values) == ("a - b", "ms", [4.0, -2.0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0123456, "0.0123"),
        (1.23456, "1.235"),
        (12.3456, "12.35"),
        (1234.56, "1235"),
        (-12.3456, "-12.35"),
    ],
)
def test_number_shows_four_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_rows_line_up() -> None:
    assert format_rows([("name", "n"), ("a", "100")]) == ["name    n", "a     100"]


@pytest.mark.parametrize(("value", "verdict"), [(40.0, "holds"), (40.1, "DOES NOT HOLD")])
def test_claim_says_whether_it_holds(value: float, verdict: str) -> None:
    report = Report("Boot")
    report.claim("before", value, limit=40.0, unit="ms")
    assert report.table().splitlines()[-1].endswith(verdict)


def test_json_holds_every_value_and_the_machine() -> None:
    report = Report("Boot")
    report.add(Series("boot", "ms", [4.0, 2.0]))
    report.claim("before", 3.0, limit=4.0, unit="ms")
    found = json.loads(report.to_json())
    assert found["series"][0]["values"] == [4.0, 2.0]
    assert found["claims"] == [{"claim": "before", "value": 3.0, "limit": 4.0, "unit": "ms", "holds": True}]
    assert set(found["machine"]) == {"cpu", "kernel", "python", "qemu", "load", "at"}
