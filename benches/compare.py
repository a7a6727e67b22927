"""Two revisions, each measured on this machine: what is worse by more than 10 % beside the same peer.

Only ratios are compared, since those were measured beside a peer in the same run; times depend on the hour.

    git worktree add ../before REVISION && (cd ../before && ./test.sh lint && .venv/bin/nox -s bench)
    .venv/bin/nox -s bench
    .venv/bin/python benches/compare.py ../before .

The arguments are two files that `--json` wrote, or two folders with `bench-NAME.json` of each benchmark. Ends
with status 1 if a ratio is worse, and with 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from harness import format_rows

TOLERANCE = 0.10


class Change(NamedTuple):
    """One ratio before and after; the smaller the better."""

    name: str
    before: float
    after: float

    @property
    def is_worse(self) -> bool:
        return self.after > self.before * (1 + TOLERANCE)

    def row(self) -> tuple[str, ...]:
        share = self.after / self.before - 1
        return (
            self.name,
            f"{self.before:.3f}",
            f"{self.after:.3f}",
            f"{share:+.0%}",
            "WORSE" * self.is_worse,
        )


def ratios(place: Path) -> dict[str, float]:
    """Return all ratios in a report, or in all reports of a folder, each named after its benchmark."""
    paths = sorted(place.glob("bench-*.json")) if place.is_dir() else [place]
    found = {}
    for path in paths:
        report = json.loads(path.read_text())
        found |= {f"{report['title']}: {name}": value for name, value in report.get("ratios", {}).items()}
    return found


def compare(before: dict[str, float], after: dict[str, float]) -> list[Change]:
    """Return what both have."""
    return [Change(name, value, after[name]) for name, value in before.items() if name in after]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    changes = compare(ratios(options.before), ratios(options.after))
    if not changes:
        print("There is no ratio that both have", file=sys.stderr)
        sys.exit(2)
    print(
        "\n".join(format_rows([("ratio", "before", "after", "change", ""), *(one.row() for one in changes)]))
    )
    sys.exit(any(one.is_worse for one in changes))


if __name__ == "__main__":
    main()
