"""What many VMs in one process cost: memory of the manager per VM, and what they do to one VM's answers.

Two daemons run side by side, one with a single VM and one with more and more, all booted on the fake engine.
Their answers are measured in turn, so that a busy machine does the same to both; what counts is the ratio.
Memory is what the process has for itself alone, less what it had with the VM that loaded what all share.

    python benches/density.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bed import Probe, connect, end_server, program, server_environment
from cloudvmm.api.fleet import VmmsCreateData
from cloudvmm.client import DaemonClient
from guest import bench_config
from harness import RATIO, Report, Series, bench_parser
from support.vmm import Vmm

COUNTS = (1, 10, 100)
CALLS_PER_RUN = 500
COMMANDS = ("vmm.ping", "vm.info")
MEMORY_LIMIT_MIB = 0.5
P99_LIMIT = 2.0


class Daemon:
    """A daemon with one booted VM, whose socket is the first of `paths`."""

    def __init__(self, process: subprocess.Popen[bytes], client: DaemonClient) -> None:
        self.client = client
        self.paths: list[str] = []
        self._process = process
        self.add()

    def add(self) -> None:
        """Make and boot one VM more."""
        held = self.client.vmms_create(VmmsCreateData(id=f"vm{len(self.paths)}"))
        vmm = Vmm(held.api_socket)
        with contextlib.closing(vmm), tempfile.TemporaryDirectory() as files:
            vmm.put("vm.create", bench_config("fake", files))
            vmm.put("vm.boot")
        self.paths.append(held.api_socket)

    def private_mib(self) -> float:
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()
        names = ("Private_Clean:", "Private_Dirty:")
        return sum(int(line.split()[1]) for line in lines if line.startswith(names)) / 1024

    def threads_and_descriptors(self) -> tuple[int, int]:
        folder = f"/proc/{self._process.pid}"
        return len(os.listdir(f"{folder}/task")), len(os.listdir(f"{folder}/fd"))


@contextlib.contextmanager
def running_daemon() -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "api")
        with open(os.path.join(folder, "stderr"), "ab") as log:
            process = subprocess.Popen(
                [program(), "daemon", "--engine", "fake", "--api-socket", path],
                env=server_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            connect(path).close()
            with DaemonClient(path) as client:
                client.daemon_ping()
                yield Daemon(process, client)
        finally:
            end_server(process)


def fill(daemon: Daemon, report: Report) -> None:
    """Make VMs; report what each one costs besides the first."""
    chart = report.chart("density", "Memory of the manager per VM", "MiB", along="VMs")
    creation = Series("one VM more, created and booted", "ms")
    points = []
    before = daemon.private_mib()
    for count in COUNTS:
        while len(daemon.paths) <= count:
            started = time.perf_counter()
            daemon.add()
            creation.add((time.perf_counter() - started) * 1000)
        each = (daemon.private_mib() - before) / count
        report.add(Series(f"memory per VM, {count} VMs", "MiB", [each]))
        points.append((float(count), each))
    chart.add("private memory per VM", points)
    report.add(creation)
    report.claim(f"memory per VM, {COUNTS[-1]} VMs", points[-1][1], limit=MEMORY_LIMIT_MIB, unit="MiB")
    threads, descriptors = daemon.threads_and_descriptors()
    report.note(f"with {len(daemon.paths)} VMs: {threads} threads, {descriptors} descriptors")


def answers(alone: Daemon, among: Daemon, calls: int, report: Report) -> None:
    """Ask in turns: a VM that is alone in its process, and the next of many."""
    for command in COMMANDS:
        ours, theirs = Series(f"{command}, one of {COUNTS[-1]}", "us"), Series(f"{command}, one VM", "us")
        with contextlib.ExitStack() as stack:
            one, *_ = _probes(alone.paths, command, stack)
            many = _probes(among.paths, command, stack)
            for number in range(calls):
                theirs.add(one.timed_us())
                ours.add(many[number % len(many)].timed_us())
        report.add(theirs, ours)
        report.claim(
            f"p99 of {command} with {COUNTS[-1]} VMs over that with one",
            ours.p99 / theirs.p99,
            limit=P99_LIMIT,
            unit=RATIO,
        )


def _probes(paths: list[str], command: str, stack: contextlib.ExitStack) -> list[Probe]:
    """Connect to each VM, one after the other."""
    probes = [Probe(path, "GET", command) for path in paths]
    for probe in probes:
        stack.callback(probe.close)
    return probes


def main() -> None:
    options = bench_parser(__doc__, runs=10).parse_args()
    report = Report("Many VMs in one process, fake engine")
    with running_daemon() as alone, running_daemon() as among:
        fill(among, report)
        answers(alone, among, options.runs * CALLS_PER_RUN, report)
    report.publish(options.json)


if __name__ == "__main__":
    main()
