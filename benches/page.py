"""The pages with numbers from the results: what stands between two marks is written, all else is a person's.

`<!-- measured: NAME -->` begins, and `<!-- end of NAME -->` ends, what is made of `bench-NAME.json`: a table
of medians, the claims, the plots. `claims` and `machine` are made of all results. Marks of a result that is
not there keep what they hold. A new benchmark needs a pair of marks in a page, where its prose is.

    python benches/page.py          write the pages anew from the results that there are
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import PEER_FACT, format_number, format_rows

PAGES = (Path("docs", "performance.md"), Path("docs", "profiles.md"))
DATA = Path("docs", "performance", "data.json")
_MARKED = re.compile(
    r"(<!-- measured: (?P<name>\w+) -->\n)(?P<old>.*?)(<!-- end of (?P=name) -->)", re.DOTALL
)

Reports = dict[str, dict[str, Any]]


def result_of(folder: Path, name: str) -> Path:
    return folder / f"bench-{name}.json"


def load(folder: Path, names: Sequence[str] | None = None) -> Reports:
    """Return the results in `folder` by their names, in the order of `names` if given.

    What has none there is as its page shows it.
    """
    data = folder / DATA
    found: Reports = json.loads(data.read_text()) if data.exists() else {}
    for path in sorted(folder.glob("bench-*.json")):
        name, fresh = path.stem.removeprefix("bench-"), json.loads(path.read_text())
        if name not in found or _when(fresh) >= _when(found[name]):
            found[name] = fresh
    return {name: found[name] for name in (found if names is None else names) if name in found}


def _when(report: dict[str, Any]) -> str:
    """Return when it was measured; an older file may lie beside a page that is newer."""
    return str(report["machine"]["at"])


def write(folder: Path, reports: Reports) -> None:
    """Bring the pages in `folder` up to `reports`, with their plots and their data."""
    import plot

    for path in (folder / page for page in PAGES):
        path.write_text(filled(path.read_text(), reports))
    (folder / DATA).parent.mkdir(exist_ok=True)
    (folder / DATA).write_text(
        json.dumps({name: without_values(one) for name, one in reports.items()}, indent=1)
    )
    for report in reports.values():
        for chart in report.get("charts", ()):
            plot.draw(chart, (folder / DATA).parent)


def filled(text: str, reports: Reports) -> str:
    """Return the page `text` with what is marked made of `reports`."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "claims":
            new = claims_table(reports) if reports else match["old"]
        elif name == "machine":
            new = machines(reports) if reports else match["old"]
        elif name in reports:
            new = section(reports[name])
        else:
            new = match["old"]
        return f"{match[1]}{new}{match[4]}"

    return _MARKED.sub(fill, text)


def section(report: dict[str, Any]) -> str:
    """Return a benchmark's own tables, or else its series and ratios; and its claims and plots."""
    own = report.get("tables", ())
    lines = ["", *([] if own else series_table(report))]
    for one in own:
        lines += [f"### {one['title']}", "", *table(one["head"], one["rows"]), ""]
    if report["claims"]:
        lines += [
            *table(("claim", "measured", "limit", ""), [claim_row(one) for one in report["claims"]]),
            "",
        ]
    lines += [] if own else ratio_table(report)
    lines += [f"![{chart['title']}](performance/{chart['name']}.svg)\n" for chart in report.get("charts", ())]
    lines += [f"Measured {report['machine']['at']} at load {report['machine']['load']}.", ""]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def series_table(report: dict[str, Any]) -> list[str]:
    rows = [
        (
            one["series"],
            f"{format_number(one['median'])} {one['unit']}",
            format_number(one["p99"]),
            f"{one['spread']:.0%}",
            str(one["n"]),
        )
        for one in report["series"]
    ]
    return [*table(("what", "median", "p99", "spread", "n"), rows), ""]


def ratio_table(report: dict[str, Any]) -> list[str]:
    """Return the ratios about which nobody has promised anything."""
    claimed = {one["claim"] for one in report["claims"]}
    ratios = [(name, f"{value:.2f}") for name, value in report["ratios"].items() if name not in claimed]
    return [*table(("ratio", "measured"), ratios), ""] if ratios else []


def claims_table(reports: Reports) -> str:
    rows = [(name, *claim_row(one)) for name, report in reports.items() for one in report["claims"]]
    return "\n".join(["", *table(("benchmark", "claim", "measured", "limit", ""), rows), "", ""])


def claims_text(reports: Reports) -> str:
    """Return all claims, with their limits, for a terminal."""
    rows = [(name, *claim_row(one)) for name, report in reports.items() for one in report["claims"]]
    return "\n".join(format_rows([("benchmark", "claim", "measured", "limit", ""), *rows]))


def claim_row(claim: dict[str, Any]) -> tuple[str, str, str, str]:
    verdict = "holds" if claim["holds"] else "does not hold"
    measured = f"{format_number(claim['value'])} {claim['unit']}"
    return (claim["claim"], measured, f"{format_number(claim['limit'])} {claim['unit']}", verdict)


def machines(reports: Reports) -> str:
    """Say what everything was measured on; more than one where results are of several machines."""
    facts = ("cpu", "kernel", "python", "qemu")
    found = {tuple(report["machine"][name] for name in facts) for report in reports.values()}
    lines = [
        f"- {cpu}, Linux {kernel}, Python {python}, QEMU {qemu}"
        for cpu, kernel, python, qemu in sorted(found)
    ]
    peers = {report["machine"][PEER_FACT] for report in reports.values() if PEER_FACT in report["machine"]}
    lines += [f"- Beside {peer}" for peer in sorted(peers)]
    if any(report.get("suite", {}).get("is_quick") for report in reports.values()):
        lines.append("- Some are of a quick run (`./bench.sh --quick`), and say little")
    return "\n".join(["", *lines, "", ""])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]


def without_values(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the page is made of; the single values stay in the benchmark's own file."""
    series = [{key: value for key, value in one.items() if key != "values"} for one in report["series"]]
    return {**report, "series": series}


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    write(root, load(root))
