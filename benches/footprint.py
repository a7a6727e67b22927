"""What the server weighs, and whether readers wait while the VM is worked on.

Two parts: resident memory with a running VM; and `vmm.ping` and `vm.info` from other connections while
`vm.boot`, `vm.shutdown` and `vm.coredump` run in a loop, beside a bare echo at the same time, which shows
what the machine itself adds. A run is a second of each loop.

    python benches/footprint.py [--engine fake|qemu] [--runs N] [--json FILE]
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bed import Probe, child_process, echo_server, running_server
from guest import bench_config, engine_flags
from harness import Report, Series, bench_parser
from support.vmm import Vmm

RSS_LIMIT_MIB = 32.0
READER_LIMIT_MS = 5.0
PAUSE_S = 0.0005


def memory(flags: Sequence[str], engine: str) -> dict[str, float]:
    """MiB resident: idle, with a running VM, and after a thousand further calls."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, running_server(folder, flags) as (process, vmm):
        vmm.get("vmm.ping")
        found["idle"] = _rss_mib(process.pid)
        vmm.put("vm.create", bench_config(engine, folder))
        vmm.put("vm.boot")
        for _ in range(20):
            vmm.get("vm.info")
        found["with a running VM"] = _rss_mib(process.pid)
        for _ in range(1000):
            vmm.get("vm.info")
            vmm.get("vm.counters")
        found["after 2000 calls"] = _rss_mib(process.pid)
        found["of it private"] = _private_mib(process.pid)
    return found


def readers(flags: Sequence[str], engine: str, report: Report, load_s: float) -> list[Series]:
    """Milliseconds per read: quiet, and while another client changes the VM without pause."""
    found: list[Series] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        echo_server(folder) as echo_path,
        running_server(folder, flags) as (_, vmm),
        contextlib.ExitStack() as stack,
    ):
        vmm.put("vm.create", bench_config(engine, folder))
        probes = {
            "echo": Probe(echo_path, "GET", "vmm.ping"),
            "vmm.ping": Probe(vmm.path, "GET", "vmm.ping"),
            "vm.info": Probe(vmm.path, "GET", "vm.info"),
        }
        for probe in probes.values():
            stack.callback(probe.close)
        vmm.put("vm.boot")
        found += _read(probes, "running VM", 2.0)
        for name, change in _changes(folder).items():
            with mmap.mmap(-1, 8) as counter:
                with child_process(lambda change=change, counter=counter: _repeat(vmm.path, change, counter)):
                    found += _read(probes, name, load_s)
                report.note(f"{name}: done {int.from_bytes(counter, 'little')} times in {load_s:g} s")
    return found


def _changes(folder: str) -> dict[str, Callable[[Vmm], None]]:
    core = os.path.join(folder, "core")

    def boot(vmm: Vmm) -> None:
        vmm.exchange("PUT", "vm.shutdown")
        vmm.put("vm.boot")

    def coredump(vmm: Vmm) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(core)
        vmm.put("vm.coredump", {"destination_url": f"file://{core}"})

    return {"boot+shutdown": boot, "coredump": coredump}


def _repeat(path: str, change: Callable[[Vmm], None], counter: mmap.mmap) -> None:
    """Carry `change` out for ever and count in `counter`, which another process reads."""
    vmm = Vmm(path)
    for done in itertools.count(1):
        change(vmm)
        counter[:] = done.to_bytes(8, "little")


def _read(probes: dict[str, Probe], during: str, seconds: float) -> list[Series]:
    series = {name: Series(f"{name} ({during})", "ms") for name in probes}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for name, probe in probes.items():
            series[name].add(probe.timed_us() / 1000)
        time.sleep(PAUSE_S)  # a client that asks now and then, not one that takes a whole core
    return list(series.values())


def _rss_mib(pid: int) -> float:
    return _smaps(pid, ("Rss:",))


def _private_mib(pid: int) -> float:
    return _smaps(pid, ("Private_Clean:", "Private_Dirty:"))


def _smaps(pid: int, names: Sequence[str]) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(tuple(names))) / 1024


def main() -> None:
    parser = bench_parser(__doc__, runs=8)
    parser.add_argument("--engine", choices=("fake", "qemu"), default="fake")
    options = parser.parse_args()
    flags = engine_flags(options.engine)
    report = Report(f"Footprint of the server, engine {options.engine}")
    sizes = memory(flags, options.engine)
    report.claim("RSS with a running VM", sizes["with a running VM"], limit=RSS_LIMIT_MIB, unit="MiB")
    report.add(*(Series(f"resident, {when}", "MiB", [size]) for when, size in sizes.items()))
    for series in readers(flags, options.engine, report, options.runs):
        report.add(series)
        if "running VM" not in series.name and not series.name.startswith("echo"):
            report.claim(f"p99 of {series.name}", series.p99, limit=READER_LIMIT_MS, unit="ms")
    report.publish(options.json)


if __name__ == "__main__":
    main()
