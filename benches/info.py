"""What `vm.info` and `vm.counters` cost by the number of devices, over one kept connection, fake engine.

The VMM answers `vm.info` with the same object for as long as it says the same; so it is asked right after
something has changed, too, when it must be made anew.

    python benches/info.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from bed import Probe, running_server
from guest import bench_config
from harness import Report, Series, bench_parser
from support.vmm import Vmm

DEVICES = (1, 10, 30, 100)
CALLS_PER_RUN = 40
LIMIT_MS = 1.0
DISK_BYTES = 1024 * 1024


def config(folder: str, devices: int) -> dict[str, Any]:
    """Return a VM of `devices` disks."""
    disks = []
    for number in range(devices):
        path = Path(folder, f"disk{number}")
        with path.open("wb") as file:
            file.truncate(DISK_BYTES)
        disks.append({"id": f"d{number}", "path": str(path), "image_type": "Raw"})
    return bench_config("fake", folder) | {"disks": disks}


def measure(devices: int, calls: int) -> dict[str, Series]:
    names = ("vm.info", "vm.info after a change", "vm.counters")
    series = {name: Series(f"{name}, {devices} devices", "ms") for name in names}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(folder, ["--engine", "fake"]) as (_, vmm),
        contextlib.ExitStack() as stack,
    ):
        vmm.put("vm.create", config(folder, devices))
        vmm.put("vm.boot")
        found = len([name for name in vmm.get("vm.info")["device_tree"] if name.startswith("d")])
        if found < devices:
            raise SystemExit(f"The VM has {found} disks instead of {devices}")
        probes = {name: Probe(vmm.path, "GET", name) for name in ("vm.info", "vm.counters")}
        for probe in probes.values():
            stack.callback(probe.close)
        for number in range(calls):
            change(vmm, number)
            series["vm.info after a change"].add(probes["vm.info"].timed_us() / 1000)
            series["vm.info"].add(probes["vm.info"].timed_us() / 1000)
            series["vm.counters"].add(probes["vm.counters"].timed_us() / 1000)
    return series


def change(vmm: Vmm, number: int) -> None:
    vmm.put("vm.resume" if number % 2 else "vm.pause")


def main() -> None:
    options = bench_parser(__doc__, runs=10).parse_args()
    report = Report("Looking at a VM by the number of its devices, fake engine")
    chart = report.chart("info", "Time of an answer by the number of devices, median", "ms", along="devices")
    lines: dict[str, list[tuple[float, float]]] = {}
    for devices in DEVICES:
        found = measure(devices, options.runs * CALLS_PER_RUN)
        report.add(*found.values())
        for name, series in found.items():
            lines.setdefault(name, []).append((float(devices), series.median))
    for name, points in lines.items():
        chart.add(name, points)
    for name in ("vm.info", "vm.info after a change"):
        _, most = lines[name][-1]
        report.claim(f"{name} with {DEVICES[-1]} devices, median", most, limit=LIMIT_MS, unit="ms")
        report.ratios[f"{name}, {DEVICES[-1]} devices over {DEVICES[0]}"] = most / lines[name][0][1]
    report.publish(options.json)


if __name__ == "__main__":
    main()
