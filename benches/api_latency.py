"""What an API call costs over a kept connection, beside a bare echo on the same kind of socket.

The server is the installed command with the fake engine, so what is measured is HTTP, the channel and the
control loop. The echo is plain Python, a thread per connection, as the server is. All calls take turns in
small batches, so that a busy machine disturbs each alike.

    python benches/api_latency.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import contextlib
import json
import tempfile

from bed import Probe, echo_server, running_server
from harness import Report, Series, bench_parser

BATCH = 50
CALLS_PER_RUN = 1000
PING_OVERHEAD_LIMIT_US = 60.0
CONFIG = {
    "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
    "payload": {"kernel": "/vmlinux"},
    "console": {"mode": "Null"},
}


def measure(calls: int) -> dict[str, Series]:
    """Measure each call `calls` times; create and delete are one."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        echo_path = stack.enter_context(echo_server(folder))
        _, vmm = stack.enter_context(running_server(folder, ["--engine", "fake"]))
        probes = {
            "echo": Probe(echo_path, "GET", "vmm.ping"),
            "vmm.ping": Probe(vmm.path, "GET", "vmm.ping"),
            "vm.info": Probe(vmm.path, "GET", "vm.info"),
            "vm.create": Probe(vmm.path, "PUT", "vm.create", json.dumps(CONFIG).encode()),
            "vm.delete": Probe(vmm.path, "PUT", "vm.delete"),
        }
        for probe in probes.values():
            stack.callback(probe.close)
        series = {name: Series(name, "us") for name in ("echo", "vmm.ping", "vm.info", "create+delete")}
        for _ in range(max(1, calls // BATCH)):
            for name in ("echo", "vmm.ping"):
                series[name].values += [probes[name].timed_us() for _ in range(BATCH)]
            series["create+delete"].values += [
                probes["vm.create"].timed_us() + probes["vm.delete"].timed_us() for _ in range(BATCH)
            ]
            vmm.put("vm.create", CONFIG)
            series["vm.info"].values += [probes["vm.info"].timed_us() for _ in range(BATCH)]
            vmm.put("vm.delete")
    return series


def main() -> None:
    options = bench_parser(__doc__, runs=5).parse_args()
    series = measure(options.runs * CALLS_PER_RUN)
    echo, ping = series["echo"], series["vmm.ping"]
    report = Report("API latency over one kept connection, fake engine")
    report.add(*series.values())
    report.claim(
        "vmm.ping p50 - echo p50", ping.median - echo.median, limit=PING_OVERHEAD_LIMIT_US, unit="us"
    )
    for name in ("vmm.ping", "vm.info", "create+delete"):
        report.ratio(series[name], echo)
    report.publish(options.json)


if __name__ == "__main__":
    main()
