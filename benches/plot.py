"""Charts of a result as PNG and SVG; the only place that needs matplotlib (`pip install -e '.[bench]'`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
# Nothing of the hour or of chance: the same numbers give the same files.
matplotlib.rcParams["svg.hashsalt"] = "cloudvmm"
matplotlib.rcParams["svg.fonttype"] = "none"

from matplotlib import pyplot  # noqa: E402

_WIDTH = 7.5


def draw(chart: dict[str, Any], folder: Path) -> None:
    """Write `chart` as NAME.png and NAME.svg into `folder`."""
    lines = chart["lines"]
    height = 3.6 if chart["along"] else 0.9 + 0.42 * len(lines)
    figure, axes = pyplot.subplots(figsize=(_WIDTH, height), layout="constrained")
    if chart["along"]:
        _lines(axes, chart)
    else:
        _bars(axes, chart)
    axes.set_title(chart["title"], loc="left", fontsize=10)
    axes.grid(visible=True, axis="x" if not chart["along"] else "both", alpha=0.3)
    figure.savefig(folder / f"{chart['name']}.png", dpi=110, metadata={"Software": None})
    figure.savefig(folder / f"{chart['name']}.svg", metadata={"Date": None})
    pyplot.close(figure)


def _lines(axes: Any, chart: dict[str, Any]) -> None:
    numbers = sorted({x for points in chart["lines"].values() for x, _ in points})
    for label, points in chart["lines"].items():
        # By rank: counts go up by powers, and the first is often 0.
        axes.plot([numbers.index(x) for x, _ in points], [y for _, y in points], marker="o", label=label)
    axes.set_xticks(range(len(numbers)), [f"{x:g}" for x in numbers])
    axes.set_xlabel(chart["along"])
    axes.set_ylabel(chart["unit"])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _bars(axes: Any, chart: dict[str, Any]) -> None:
    labels = list(chart["lines"])
    values = [points[0][1] for points in chart["lines"].values()]
    bars = axes.barh(range(len(labels)), values, height=0.6)
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(chart["unit"])
