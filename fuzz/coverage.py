"""Search a target's inputs by the code that they reach, with atheris.

    python fuzz/coverage.py TARGET [--seconds 60] [--runs N] [--seed N]

Half of the mutants are the target's own, which know its form, half libFuzzer's. What reaches new code is kept
in `fuzz-failures/TARGET-found` and is where the next search begins, beside the corpus. A broken promise is
reported as by any search: made smaller, kept, and the status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import sys
from typing import Any, NoReturn

import runner

NOT_INSTALLED = "atheris is not installed, which this search needs: pip install 'cloudvmm[fuzz]'"
MISSING_STATUS = 2


def load(name: str) -> tuple[Any, runner.Target]:
    """Return atheris and the target `name`, with what it tests instrumented."""
    try:
        import atheris  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        print(NOT_INSTALLED, file=sys.stderr)
        sys.exit(MISSING_STATUS)
    with atheris.instrument_imports(include=["cloudvmm", "jeepney"]):
        module = importlib.import_module(name)
    return atheris, module.TARGET


def search(name: str, *, seconds: float, seed: int, runs: int | None) -> NoReturn:
    """Search until the time or the runs are over, or a promise is broken. Ends the process."""
    atheris, target = load(name)
    corpus = [path.read_bytes() for path in target.corpus()]

    def check(data: bytes) -> None:
        try:
            target.check(data)
        except Exception as error:
            failure = runner.Failure(data, 0)
            failure.__cause__ = error
            runner.report(target, failure)
            sys.stderr.flush()
            os._exit(1)  # libFuzzer would say it all again

    def change(data: bytes, most_bytes: int, chosen: int) -> bytes:
        noise = random.Random(chosen)
        if noise.random() < 0.5:
            return bytes(atheris.Mutate(data, most_bytes))
        return runner.mutate(data, corpus, target, noise)[:most_bytes]

    found = runner.FAILURES / f"{name}-found"  # libFuzzer adds to the first folder, and only reads the next
    found.mkdir(parents=True, exist_ok=True)
    words = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-timeout={round(runner.LONGEST_S)}",
        f"-seed={seed}",
        f"-runs={-1 if runs is None else runs}",
        f"-max_len={runner.MOST_BYTES}",
        f"-artifact_prefix={runner.FAILURES}/{name}-",
        *("-verbosity=0", "-print_final_stats=1"),
    ]
    atheris.Setup([sys.argv[0], *words, str(found), str(runner.CORPUS / name)], check, custom_mutator=change)
    print(f"{name}: seed {seed}, by coverage", flush=True)
    atheris.Fuzz()  # libFuzzer ends the process when it is done
    sys.exit(0)


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="python fuzz/coverage.py", description="Search by coverage")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--runs", type=int, help="at most")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1, 2**31) if options.seed is None else options.seed
    search(options.target, seconds=options.seconds, seed=seed, runs=options.runs)


if __name__ == "__main__":
    main()
