"""What an API call costs over a kept connection, beside a bare echo and, if named, the real Cloud Hypervisor.

The server is the installed command with the fake engine, so what is measured is HTTP, the channel and the
control loop. The echo is plain Python, a thread per connection, as the server is. All calls take turns in
small batches, so that a busy machine disturbs each alike.

    python benches/api_latency.py [--runs N] [--cloud-hypervisor PATH] [--json FILE]
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator

from bed import SMALL_CONFIG, Probe, echo_server, running_server
from harness import RATIO, Report, Series, add_peer_option, bench_parser, note_peer
from support.vmm import Vmm

BATCH = 50
CALLS_PER_RUN = 1000
PING_OVERHEAD_LIMIT_US = 60.0
PEER_LIMIT = 1.5
PEER = "Cloud Hypervisor"
OPERATIONS = ("vmm.ping", "vm.info", "create+delete")


class Side:
    """One server, and what its calls took so far."""

    def __init__(self, vmm: Vmm, stack: contextlib.ExitStack, *, label: str = "") -> None:
        self._vmm = vmm
        self._ping = Probe(vmm.path, "GET", "vmm.ping")
        stack.callback(self._ping.close)
        body = json.dumps(SMALL_CONFIG).encode()
        self._info = Probe(vmm.path, "GET", "vm.info", beside=self._ping)
        self._create = Probe(vmm.path, "PUT", "vm.create", body, beside=self._ping)
        self._delete = Probe(vmm.path, "PUT", "vm.delete", beside=self._ping)
        self.series = {name: Series(label + name, "us") for name in OPERATIONS}

    def measure(self) -> None:
        """Take one batch of each call."""
        self.series["vmm.ping"].values += [self._ping.timed_us() for _ in range(BATCH)]
        self.series["create+delete"].values += [
            self._create.timed_us() + self._delete.timed_us() for _ in range(BATCH)
        ]
        self._vmm.put("vm.create", SMALL_CONFIG)
        self.series["vm.info"].values += [self._info.timed_us() for _ in range(BATCH)]
        self._vmm.put("vm.delete")


def measure(calls: int, peer: str | None) -> tuple[Series, dict[str, Series], dict[str, Series] | None]:
    """Measure each call `calls` times; create and delete are one. Return the echo's, ours and the peer's."""
    with contextlib.ExitStack() as stack:
        echo = Probe(stack.enter_context(_echo()), "GET", "vmm.ping")
        stack.callback(echo.close)
        sides = [Side(stack.enter_context(_server(["--engine", "fake"], None)), stack)]
        if peer is not None:
            sides.append(Side(stack.enter_context(_server([], peer)), stack, label=f"{PEER}: "))
        series = Series("echo", "us")
        for _ in range(max(1, calls // BATCH)):
            series.values += [echo.timed_us() for _ in range(BATCH)]
            for side in sides:
                side.measure()
    return series, sides[0].series, sides[1].series if peer is not None else None


@contextlib.contextmanager
def _echo() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, echo_server(folder) as path:
        yield path


@contextlib.contextmanager
def _server(flags: list[str], binary: str | None) -> Iterator[Vmm]:
    with tempfile.TemporaryDirectory() as folder, running_server(folder, flags, binary=binary) as (_, vmm):
        yield vmm


def main() -> None:
    parser = bench_parser(__doc__, runs=5)
    add_peer_option(parser)
    options = parser.parse_args()
    echo, ours, theirs = measure(options.runs * CALLS_PER_RUN, options.cloud_hypervisor)
    report = Report("API latency over one kept connection, fake engine")
    note_peer(report, options.cloud_hypervisor)
    report.add(echo, *ours.values(), *(theirs or {}).values())
    report.claim(
        "vmm.ping p50 - echo p50",
        ours["vmm.ping"].median - echo.median,
        limit=PING_OVERHEAD_LIMIT_US,
        unit="us",
    )
    for name in OPERATIONS:
        report.ratio(ours[name], echo)
    report.bars("api_latency", "One call over a kept connection, median", echo, *ours.values())
    if theirs is None:
        report.note(f"{PEER}: not measured; name its binary with --cloud-hypervisor PATH")
    for name in OPERATIONS if theirs is not None else ():
        mine, peer = ours[name], theirs[name]
        report.claim(f"{name} p50, over {PEER}'s", mine.median / peer.median, limit=PEER_LIMIT, unit=RATIO)
        report.claim(f"{name} p99, over {PEER}'s", mine.p99 / peer.p99, limit=PEER_LIMIT, unit=RATIO)
    report.publish(options.json)


if __name__ == "__main__":
    main()
