"""From exec to the first answered ping, beside what a bare Python interpreter takes to start and to end.

Bare is `python -c pass`: the same interpreter in the same environment, without -I or -S. All take turns,
so that a busy machine disturbs each alike; the claim is the median of the pairs' ratios. The processor time
is what the same would take on a machine that has nothing else to do.

    python benches/start.py [--engine fake|qemu] [--runs N] [--cloud-hypervisor PATH] [--json FILE]
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from api_latency import PEER
from bed import connect, end_server, processor_s, program, server_environment, start_server
from guest import engine_flags
from harness import RATIO, Report, Series, add_peer_option, bench_parser, note_peer, paired_ratio
from support.rest import request_bytes
from support.vmm import Vmm

BARE_LIMIT = 2.5
START_LIMIT_MS = 200.0
PING = request_bytes("GET", "/api/v1/vmm.ping")


class Starts:
    """What starting `binary` (our own command by default) with `flags` took so far."""

    def __init__(self, name: str, flags: list[str], *, binary: str | None = None) -> None:
        self.wall = Series(f"{name}: exec to first answer", "ms")
        self.work = Series(f"{name}: processor time of it", "ms")
        self._flags = flags
        self._binary = binary

    def take(self, *, is_counted: bool = True) -> None:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter_ns()
            process, path = start_server(folder, self._flags, binary=self._binary)
            try:
                with contextlib.closing(connect(path, process)) as client:
                    client.sendall(PING)
                    client.recv(4096)
                    took_ms = (time.perf_counter_ns() - started) / 1e6
                    if is_counted:
                        self.wall.add(took_ms)
                        self.work.add(processor_s(process.pid) * 1000)
            finally:
                end_server(process)


class BareStarts:
    """The interpreter of our own command that does nothing."""

    def __init__(self) -> None:
        self.wall = Series("bare interpreter", "ms")
        self.work = Series("bare interpreter: processor time", "ms")

    def take(self, *, is_counted: bool = True) -> None:
        started = time.perf_counter_ns()
        process = subprocess.Popen([sys.executable, "-c", "pass"], env=server_environment())
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        if is_counted:
            self.wall.add((time.perf_counter_ns() - started) / 1e6)
            self.work.add((usage.ru_utime + usage.ru_stime) * 1000)


def import_times(flags: list[str]) -> list[tuple[float, str]]:
    """Own milliseconds per module that a server imports until it answers, as `-X importtime` has it."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = os.path.join(folder, "api"), Path(folder, "log")
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-X", "importtime", program(), "--api-socket", path, *flags],
                env=server_environment(),
                stderr=stderr,
            )
            try:
                vmm = Vmm(path)
                connect(path).close()
                vmm.get("vmm.ping")
                traced = log.read_text()  # what comes after the answer is another matter
                vmm.close()
            finally:
                end_server(process)
        lines = [line.split("|") for line in traced.splitlines() if line.startswith("import time:")]
    return sorted(((int(own.split(":")[1]) / 1000, name.strip()) for own, _, name in lines[1:]), reverse=True)


def main() -> None:
    parser = bench_parser(__doc__, runs=31)
    parser.add_argument("--engine", choices=("fake", "qemu"), default="qemu")
    add_peer_option(parser)
    options = parser.parse_args()
    flags = engine_flags(options.engine)
    bare, ours = BareStarts(), Starts("cloudvmm", flags)
    sides: list[BareStarts | Starts] = [bare, ours]
    if options.cloud_hypervisor is not None:
        sides.append(Starts(PEER, [], binary=options.cloud_hypervisor))
    for side in sides:
        side.take(is_counted=False)  # the first start compiles
    for _ in range(options.runs):
        for side in sides:
            side.take()
    report = Report("Start of the server to its first answer")
    note_peer(report, options.cloud_hypervisor)
    for side in sides:
        report.add(side.wall, side.work)
    report.claim("exec to first answer", ours.wall.median, limit=START_LIMIT_MS, unit="ms")
    report.claim(
        "exec to first answer over a bare interpreter's start, median of the pairs",
        paired_ratio(ours.wall, bare.wall),
        limit=BARE_LIMIT,
        unit=RATIO,
    )
    for name, value in (("processor time", paired_ratio(ours.work, bare.work)),):
        report.ratios[f"{name} over a bare interpreter's"] = value
        report.note(f"{name} over a bare interpreter's, median of the pairs: {value:.2f}")
    modules = import_times(flags)
    dearest = ", ".join(f"{name} {own:.1f}" for own, name in modules[:10])
    whole = sum(own for own, _ in modules)
    report.note(f"Imports (traced, ms): {len(modules)} modules, {whole:.0f}: {dearest}")
    report.bars("start", "Start to first answer, median", *(side.wall for side in sides))
    report.publish(options.json)


if __name__ == "__main__":
    main()
