"""How the cost of a start grows with RAM and with devices: `vm.boot` to its answer, beside QEMU by hand.

The answer comes when vCPUs have been let go; the guest's own time is in neither. By hand the same QEMU is
started, shaken hands with and told to go on (`by_hand.py`). Both take turns.

    python benches/growth.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
from bed import running_server
from boot import qemu_of
from guest import bench_config, engine_flags
from harness import Chart, Report, Series, bench_parser, paired_ratio
from support.vmm import Vmm

MIB = 1024 * 1024
RAM_MIB = (128, 512, 2048, 8192)
DISKS = (0, 8, 32, 64)


def with_ram(folder: str, ram_mib: int) -> dict[str, Any]:
    return bench_config("qemu", folder) | {"memory": {"size": ram_mib * MIB}}


def with_disks(folder: str, count: int) -> dict[str, Any]:
    disks = []
    for number in range(count):
        path = Path(folder, f"disk{number}")
        with path.open("wb") as file:
            file.truncate(MIB)
        disks.append({"path": str(path), "image_type": "Raw"})
    return bench_config("qemu", folder) | ({"disks": disks} if disks else {})


def measure(
    vmm: Vmm, server_pid: int, folder: str, config: dict[str, Any], runs: int
) -> tuple[Series, Series]:
    """Return what the server took, and what it took by hand, in milliseconds."""
    ours, theirs = Series("", "ms"), Series("", "ms")
    vmm.put("vm.create", config)
    vmm.put("vm.boot")
    serial = os.path.join(folder, "serial")
    # QEMU keeps duplicates of what it was passed; the numbers in its command line are other files by now.
    images = {f"/dev/fdset/{number}": disk["path"] for number, disk in enumerate(config.get("disks", ()), 1)}
    renamed = {serial: serial + "-by-hand", **images}
    command = by_hand.command_of(qemu_of(server_pid), folder, renamed=renamed)
    vmm.put("vm.shutdown")
    for _ in range(runs):
        started = time.monotonic()
        vmm.put("vm.boot")
        ours.add((time.monotonic() - started) * 1000)
        vmm.put("vm.shutdown")
        theirs.add(by_hand.run_until_continued(command) * 1000)
    vmm.put("vm.delete")
    return ours, theirs


def grow(
    report: Report,
    chart: Chart,
    counts: tuple[int, ...],
    unit: str,
    make: Callable[[str, int], dict[str, Any]],
    runs: int,
) -> None:
    """Measure each of `counts` and add it to `report` and `chart`."""
    lines: dict[str, list[tuple[float, float]]] = {"vm.boot": [], "by hand": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(folder, engine_flags("qemu")) as (server, vmm),
    ):
        for count in counts:
            ours, theirs = measure(vmm, server.pid, folder, make(folder, count), runs)
            ours.name = f"vm.boot to its answer, {count} {unit}"
            theirs.name = f"the same by hand, {count} {unit}"
            report.add(ours, theirs)
            report.ratios[f"vm.boot over by hand, {count} {unit}"] = paired_ratio(ours, theirs)
            lines["vm.boot"].append((float(count), ours.median))
            lines["by hand"].append((float(count), theirs.median))
    for label, points in lines.items():
        chart.add(label, points)


def main() -> None:
    options = bench_parser(__doc__, runs=9).parse_args()
    report = Report("A start by the size of RAM and the number of disks")
    title = "vm.boot to its answer, median"
    chart = report.chart("growth_ram", title, "ms", along="MiB of RAM")
    grow(report, chart, RAM_MIB, "MiB", with_ram, options.runs)
    chart = report.chart("growth_disks", title, "ms", along="disks")
    grow(report, chart, DISKS, "disks", with_disks, options.runs)
    for name, value in report.ratios.items():
        report.note(f"{name}, median of the pairs: {value:.2f}")
    report.publish(options.json)


if __name__ == "__main__":
    main()
