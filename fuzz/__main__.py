"""Run every fuzz target, two at a time, each in a process of its own.

    python fuzz [--seconds 60] [--runs N] [--seed N]

With a seed and a count, and time enough, any machine looks at the same inputs. Ends with status 1 if any
target failed; each has then said how to see the failure again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
TARGETS = ("config_json", "http_grammar", "option_grammar", "qmp_codec")
AT_A_TIME = 2
START_S = 60.0  # what a target may take beyond its time, a failure's way to smaller size included


def run(name: str, *, seconds: float, runs: int | None, seed: int | None) -> int:
    """Run one target and pass on what it says; return its status."""
    chosen = [] if seed is None else ["--seed", str(seed)]
    chosen += [] if runs is None else ["--runs", str(runs)]
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--seconds", str(seconds), *chosen]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds + START_S, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: does not end", flush=True)
        return 1
    print(done.stdout + done.stderr, end="", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python fuzz", description="Run every fuzz target")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--runs", type=int, help="for each target, at most")
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        statuses = list(pool.map(lambda name: run(name, **vars(options)), TARGETS))
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
