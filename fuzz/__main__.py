"""Run every fuzz target, two at a time, each in a process of its own.

    python fuzz [--seconds 60] [--runs N] [--seed N]
    python fuzz --coverage [--seconds 60] [--runs N] [--seed N]

With a seed and a count, and time enough, any machine looks at the same inputs. With `--coverage` they are
chosen by the code that they reach (`coverage.py`). Ends with status 1 if any target failed; each has then
said how to see the failure again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runner import names

FOLDER = Path(__file__).parent
AT_A_TIME = 2
START_S = 60.0  # what a target may take beyond its time, a failure's way to smaller size included


def run(name: str, *, seconds: float, runs: int | None, seed: int | None, coverage: bool = False) -> int:
    """Run one target and pass on what it says; return its status."""
    chosen = [] if seed is None else ["--seed", str(seed)]
    chosen += [] if runs is None else ["--runs", str(runs)]
    program = ["coverage.py", name] if coverage else [f"{name}.py"]
    command = [sys.executable, str(FOLDER / program[0]), *program[1:], "--seconds", str(seconds), *chosen]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds + START_S, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: does not end", flush=True)
        return 1
    said = done.stdout + done.stderr
    if coverage and done.returncode == 0:  # libFuzzer has much to say of itself
        count = re.search(r"^stat::number_of_executed_units: *(\d+)$", done.stderr, re.MULTILINE)
        said = f"{done.stdout}{name}: {count[1] if count else 'no'} inputs held\n"
    print(said, end="", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python fuzz", description="Run every fuzz target")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--runs", type=int, help="for each target, at most")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--coverage", action="store_true", help="choose inputs by the code that they reach")
    options = parser.parse_args()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        statuses = list(pool.map(lambda name: run(name, **vars(options)), names()))
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
