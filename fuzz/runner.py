"""What all fuzz targets share: corpus, mutation, the search, and what is done about a failure.

A target is a function of bytes. It raises when a promise is broken, and else returns what came of the input,
in a few words: an input with an outcome that was not seen before joins the pool from which mutants are bred.
That stands in for coverage, at no cost. The same seed gives the same inputs on any machine; only when time
ends the search differs.

    python fuzz/TARGET.py [--seconds 60] [--runs N] [--seed N]     search
    python fuzz/TARGET.py FILE...                                  check these files only

`coverage.py` searches by the code that is reached.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

CORPUS = Path(__file__).parent / "corpus"
FAILURES = Path("fuzz-failures")

LONGEST_S = 10.0  # that one input may take
POOL_SIZE = 4000
SMALLER_S = 5.0  # spent on making a failing input smaller
MOST_BYTES = 20_000

_NUMBERS = (b"0", b"-1", b"1", b"255", b"256", b"65536", b"4294967296", b"18446744073709551615",
            b"18446744073709551616", b"1e3", b"00", b"9" * 25)  # fmt: skip
_PIECES = (b"", b"\0", b"\xff", b"\xc3\xa9", b"\xed\xa0\x80", b"\r\n", b"\n", b" ", b",", b"=", b'"', b"\\",
           b"[", b"]", b"{", b"}", b":", b"-", b"@", b"+", b"%")  # fmt: skip


class Target(NamedTuple):
    """`words` are what mutants are given besides pieces of each other; `mutate` may know the form.

    `share` is the part of the inputs asked for that it looks at: less for what costs more, or is simpler.
    """

    name: str
    check: Callable[[bytes], Hashable]
    words: tuple[bytes, ...] = ()
    mutate: Callable[[bytes, random.Random], bytes] | None = None
    share: float = 1.0

    def corpus(self) -> list[Path]:
        return sorted((CORPUS / self.name).iterdir())


def names() -> list[str]:
    """Return the names of all targets: each is a module, and a folder of the corpus."""
    return sorted(path.name for path in CORPUS.iterdir())


class Failure(Exception):
    """An input broke a promise; the cause is what was raised."""

    def __init__(self, data: bytes, number: int) -> None:
        super().__init__(f"Input {number} broke a promise")
        self.data = data
        self.number = number


class TooSlow(Exception):
    """One input took longer than any may"""


def search(
    target: Target, *, seed: int, runs: int | None = None, seconds: float | None = None
) -> tuple[int, int]:
    """Check the corpus, then mutants, until `runs` or `seconds` are over.

    Return how many were checked, and how many different outcomes they had.

    To be called by the main thread.

    :raises Failure: at the first that breaks a promise.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    noise = random.Random(seed)
    corpus = [path.read_bytes() for path in target.corpus()]
    pool = list(corpus)
    seen: set[Hashable] = set()
    number = 0
    with _alarm():
        while number != runs and (deadline is None or time.monotonic() < deadline):
            is_mutant = number >= len(corpus)
            data = mutate(noise.choice(pool), pool, target, noise) if is_mutant else corpus[number]
            outcome = _check(target, data, number)
            number += 1
            if is_mutant and outcome not in seen and len(pool) < POOL_SIZE:
                pool.append(data)
            seen.add(outcome)
    return number, len(seen)


def _check(target: Target, data: bytes, number: int) -> Hashable:
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        return target.check(data)
    except Exception as error:
        raise Failure(data, number) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _alarm:  # noqa: N801
    """While it lasts, an input that hangs is a failure."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGALRM, self._ring)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGALRM, self._before)

    @staticmethod
    def _ring(_number: int, _frame: object) -> NoReturn:
        raise TooSlow


# Mutation


def mutate(data: bytes, pool: list[bytes], target: Target, noise: random.Random) -> bytes:
    for _ in range(noise.choice((1, 1, 1, 2, 3, 6))):
        if target.mutate is not None and noise.random() < 0.5:
            data = target.mutate(data, noise)
        else:
            data = _change(data, pool, target.words, noise)
    return data[:MOST_BYTES]


def _change(data: bytes, pool: list[bytes], words: tuple[bytes, ...], noise: random.Random) -> bytes:
    start, end = _span(data, noise)
    match noise.randrange(9):
        case 0:
            return data[:start] + bytes((noise.randrange(256),)) + data[start + 1 :]
        case 1:
            return data[:start] + data[end:]
        case 2:
            return data[:end] + data[start:end] * noise.choice((1, 1, 2, 50)) + data[end:]
        case 3:
            return data[:start] + noise.choice(_PIECES) + data[start:]
        case 4:
            return data[:start] + noise.choice(words or _PIECES) + data[start:]
        case 5:
            return data[:start] + noise.choice(words or _PIECES) + data[end:]
        case 6:
            return _replace_number(data, noise)
        case 7:
            other = noise.choice(pool)
            first, last = _span(other, noise)
            return data[:start] + other[first:last] + data[end:]
        case _:
            return data[:start] + noise.randbytes(noise.randrange(1, 9)) + data[start:]


def _span(data: bytes, noise: random.Random) -> tuple[int, int]:
    start = noise.randrange(len(data) + 1)
    return start, min(len(data), start + noise.choice((1, 2, 4, 8, 16, 64)))


def _replace_number(data: bytes, noise: random.Random) -> bytes:
    places = [at for at, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    if not places:
        return data + noise.choice(_NUMBERS)
    start = end = noise.choice(places)
    while end < len(data) and 0x30 <= data[end] <= 0x39:
        end += 1
    return data[:start] + noise.choice(_NUMBERS) + data[end:]


# What is done about a failure


def smaller(target: Target, failure: Failure) -> bytes:
    """Return as little of the failing input as fails in the same way, found within `SMALLER_S`."""
    data, kind = failure.data, type(failure.__cause__)
    deadline = time.monotonic() + SMALLER_S
    step = max(1, len(data) // 2)
    with _alarm():
        while time.monotonic() < deadline and kind is not TooSlow:
            shorter = next(
                (less for less in _cuts(data, step) if _fails_as(target, less, kind, deadline)), None
            )
            if shorter is not None:
                data = shorter
            elif step == 1:
                break
            else:
                step //= 2
    return data


def _cuts(data: bytes, step: int) -> Iterator[bytes]:
    for at in range(0, len(data), step):
        yield data[:at] + data[at + step :]


def _fails_as(target: Target, data: bytes, kind: type[BaseException], deadline: float) -> bool:
    if time.monotonic() > deadline:
        return False
    try:
        _check(target, data, 0)
    except Failure as failure:
        return type(failure.__cause__) is kind
    return False


def report(target: Target, failure: Failure, folder: Path = FAILURES) -> Path:
    """Write the input, made smaller, into `folder` and say on standard error what happened."""
    data = smaller(target, failure)
    folder.mkdir(exist_ok=True)
    path = folder / f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    cause = failure.__cause__
    assert cause is not None
    traceback.print_exception(cause)
    print(f"{target.name}: {failure}: {data[:2000]!r}", file=sys.stderr)
    print(f"{target.name}: kept as {path}; again with: python fuzz/{target.name}.py {path}", file=sys.stderr)
    return path


# The command line of a target


def main(target: Target) -> None:
    parser = argparse.ArgumentParser(description=f"Fuzz: {target.name}")
    parser.add_argument("files", nargs="*", type=Path, help="check these only")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    try:
        if options.files:
            with _alarm():
                for path in options.files:
                    print(f"{path}: {_check(target, path.read_bytes(), 0)}")
            return
        _search(target, options)
    except Failure as failure:
        report(target, failure)
        sys.exit(1)


def _search(target: Target, options: Any) -> None:
    seconds = 60.0 if options.seconds is None and options.runs is None else options.seconds
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"{target.name}: seed {seed}", flush=True)
    runs = None if options.runs is None else round(options.runs * target.share)
    count, outcomes = search(target, seed=seed, runs=runs, seconds=seconds)
    print(f"{target.name}: {count} inputs held, with {outcomes} different outcomes", flush=True)
