"""What an import costs above a bare interpreter: the client, and what comes with the first data.

All take turns, each in an interpreter of its own, so that a busy machine disturbs each alike.

    python benches/import_time.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import subprocess
import sys
import time

from harness import Report, Series, bench_parser, difference, paired_ratio

CLIENT_LIMIT_MS = 40.0
BARE = "bare interpreter"
PROGRAMS = {
    BARE: "pass",
    "cloudvmm.client": "import cloudvmm.client",
    "client and VmConfig": "import cloudvmm.client, cloudvmm.config.vm",
    "client and its codec": "import cloudvmm.client.codec",
    "AsyncClient": "from cloudvmm.client import AsyncClient",
    "cloudvmm.api": "from cloudvmm.api import COMMANDS",
    "cloudvmm.Vmm": "from cloudvmm import Vmm",
}


def timed_ms(program: str) -> float:
    """Return how long an interpreter runs that does nothing but `program`."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return (time.perf_counter() - begun) * 1000


def measure(runs: int) -> dict[str, Series]:
    series = {name: Series(name, "ms") for name in PROGRAMS}
    for program in PROGRAMS.values():
        timed_ms(program)  # compiles the modules
    for _ in range(runs):
        for name, program in PROGRAMS.items():
            series[name].add(timed_ms(program))
    return series


def main() -> None:
    options = bench_parser(__doc__, runs=21).parse_args()
    series = measure(options.runs)
    bare = series.pop(BARE)
    report = Report("Imports, each in a new interpreter")
    report.add(bare, *series.values())
    for name, whole in series.items():
        above = difference(whole, bare, f"{name} - bare")
        report.add(above)
        report.note(f"{name}: {paired_ratio(whole, bare):.2f} times a bare interpreter")
    (client_ms,) = (one.median for one in report.series if one.name == "cloudvmm.client - bare")
    report.claim(
        "import cloudvmm.client above a bare interpreter", client_ms, limit=CLIENT_LIMIT_MS, unit="ms"
    )
    report.publish(options.json)


if __name__ == "__main__":
    main()
