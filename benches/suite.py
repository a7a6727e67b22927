"""Every benchmark, one after the other, each within a time; then docs/performance.md, its plots and its data.

    ./bench.sh [--quick] [--only NAME]... [--resume] [--cloud-hypervisor PATH] [--no-page]

Each writes `bench-NAME.json`, so a run that was broken off goes on with `--resume`, and `--only` measures one
anew. The page is made of all the files that there are. A benchmark that fails or takes too long is told of,
its numbers are left as they were, and the rest is measured; the status is then 1. It is 0 where a claim does
not hold: that is a finding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import page
from bed import check_peer

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
END_S = 20.0


class Bench(NamedTuple):
    """`runs` and `quick_runs` are for `--runs`; `limit_s` is what it may take on a busy machine."""

    name: str
    runs: int
    quick_runs: int
    limit_s: float
    arguments: tuple[str, ...] = ()
    takes_peer: bool = False

    def command(self, result: Path, *, is_quick: bool, peer: str | None) -> list[str]:
        runs = self.quick_runs if is_quick else self.runs
        peers = ["--cloud-hypervisor", peer] if self.takes_peer and peer is not None else []
        script = str(FOLDER / f"{self.name}.py")
        return [sys.executable, script, "--runs", str(runs), "--json", str(result), *self.arguments, *peers]


BENCHES = (
    Bench("start", 31, 7, 120, takes_peer=True),
    Bench("api_latency", 5, 1, 120, takes_peer=True),
    Bench("throughput", 5, 1, 180, takes_peer=True),
    Bench("info", 10, 2, 120),
    Bench("density", 10, 2, 180),
    Bench("footprint", 8, 2, 180),
    Bench("import_time", 11, 3, 120),
    Bench("boot", 9, 2, 420),
    Bench("growth", 7, 2, 300),
    Bench("hotplug", 20, 3, 240),
    Bench("resize", 21, 2, 300),
    Bench("saved", 7, 2, 240),
    Bench("restore", 15, 1, 420),
    Bench("fork", 5, 1, 300),
    Bench("migration", 3, 1, 420),
    Bench("profiles", 5, 1, 600),
)


def run(bench: Bench, *, is_quick: bool, peer: str | None) -> str | None:
    """Measure one; return what went wrong, None if nothing did."""
    result = page.result_of(ROOT, bench.name)
    fresh = result.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    # A session of its own: where it must be ended, so must be what it started.
    process = subprocess.Popen(bench.command(fresh, is_quick=is_quick, peer=peer), start_new_session=True)
    try:
        status = process.wait(bench.limit_s)
    except subprocess.TimeoutExpired:
        return f"not done within {bench.limit_s:g} s"
    finally:
        end(process)
    if status or not fresh.exists():
        return f"ended with status {status}"
    keep(fresh, result, is_quick=is_quick)
    return None


def end(process: subprocess.Popen[bytes]) -> None:
    """End `process` as Ctrl-C would, which lets it clear up, and then by force."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def keep(fresh: Path, result: Path, *, is_quick: bool) -> None:
    """Put a new result in its place, with how and of what it was measured."""
    report = json.loads(fresh.read_text())
    report["suite"] = {"revision": revision(), "is_quick": is_quick}
    fresh.write_text(json.dumps(report, indent=1))
    os.replace(fresh, result)


def is_done(name: str, *, is_quick: bool) -> bool:
    """Whether there is a result of this revision, measured in this way."""
    result = page.result_of(ROOT, name)
    if not result.exists():
        return False
    return bool(json.loads(result.read_text()).get("suite") == {"revision": revision(), "is_quick": is_quick})


def revision() -> str:
    """Name what is measured: the commit, and whether the sources have been changed since."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(FileNotFoundError):  # what was unpacked needs no git
        found = subprocess.run(words, capture_output=True, text=True, check=False)
        return found.stdout.strip() or "unknown"
    return "unknown"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./bench.sh", description="Measure everything beside its peers and write docs/performance.md."
    )
    names = [bench.name for bench in BENCHES]
    parser.add_argument("--quick", action="store_true", help="few runs: is it there, not how fast is it")
    parser.add_argument(
        "--only",
        action="append",
        choices=names,
        metavar="NAME",
        help=f"one of {', '.join(names)}; repeatable",
    )
    parser.add_argument("--resume", action="store_true", help="leave out what has a result of this revision")
    parser.add_argument(
        "--cloud-hypervisor", metavar="PATH", help="also measure this binary, a release build"
    )
    parser.add_argument("--no-page", action="store_true", help="leave docs/ as it is")
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    if options.cloud_hypervisor is not None:
        check_peer(options.cloud_hypervisor)
    began, failures = time.monotonic(), {}
    for bench in BENCHES:
        if options.only and bench.name not in options.only:
            continue
        if options.resume and is_done(bench.name, is_quick=options.quick):
            print(f"## {bench.name}: done before", flush=True)
            continue
        print(f"## {bench.name}", flush=True)
        begun = time.monotonic()
        failure = run(bench, is_quick=options.quick, peer=options.cloud_hypervisor)
        if failure is not None:
            failures[bench.name] = failure
        print(f"## {bench.name}: {failure or 'done'} after {time.monotonic() - begun:.0f} s\n", flush=True)
    reports = page.load(ROOT, [bench.name for bench in BENCHES])
    print(page.claims_text(reports))
    if not options.no_page:
        page.write(ROOT, reports)
    print(f"All took {time.monotonic() - began:.0f} s")
    for name, failure in failures.items():
        print(f"{name} has no new numbers: {failure}", file=sys.stderr)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
