"""Fuzz the HTTP grammar: `wire.http.RequestParser` on any bytes, cut in any way.

    python fuzz/http_grammar.py [atheris options]          with atheris installed
    python fuzz/http_grammar.py --runs 100000 --seed 1     with it or without: mutated requests

What must hold: nothing is raised; a piece yields at most one refusal, as its last event; each event's bytes
are a whole response; the parser keeps less than a line between pieces; and a stream without a refusal yields
the same requests however it is cut.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from cloudvmm.wire.http import LINE_LIMIT_BYTES, Continue, Event, Refusal, Request, RequestParser

SEEDS = (
    b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PUT /api/v1/vm.boot HTTP/1.0\r\n\r\n",
    b'PUT /api/v1/vm.resize HTTP/1.1\r\nContent-Length: 19\r\n\r\n{"desired_vcpus":2}',
    b"PUT /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    b"GET http://host/x HTTP/1.1\r\nAccept-Encoding: gzip, *;q=0\r\n\r\n",
    b"PATCH / HTTP/1.1\r\nContent-Length: 4194305\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
    b"DELETE /" + b"a" * 1100 + b" HTTP/1.1\r\n\r\n",
)
MOST_PIECES = 8


def fuzz_one(data: bytes) -> None:
    """Check everything on one input, whose first bytes say where to cut the rest.

    :raises AssertionError: a promise is broken; anything else raised is a broken promise too.
    """
    cuts, stream = data[:MOST_PIECES], data[MOST_PIECES:]
    whole = feed_all([stream])
    if not any(isinstance(event, Refusal) for event in whole):
        assert feed_all(cut(stream, cuts)) == whole, "the cuts changed the requests"
    else:
        feed_all(cut(stream, cuts))


def cut(stream: bytes, cuts: bytes) -> list[bytes]:
    places = sorted(len(stream) * byte // 256 for byte in cuts)
    edges = [0, *places, len(stream)]
    return [stream[edges[i] : edges[i + 1]] for i in range(len(edges) - 1)]


def feed_all(pieces: list[bytes]) -> list[Event]:
    parser = RequestParser()
    events: list[Event] = []
    for piece in pieces:
        found = parser.feed(piece)
        assert len(parser._left) < LINE_LIMIT_BYTES, "more than a line is kept"
        assert not any(isinstance(event, Refusal) for event in found[:-1]), "something follows a refusal"
        events += found
    for event in events:
        check_event(event)
    return events


def check_event(event: Event) -> None:
    if isinstance(event, Request):
        assert event.method in ("GET", "PUT", "PATCH", "DELETE")
        assert event.path == "" or event.path.startswith("/")
        assert event.body is None or event.body
        return
    head, _, body = event.raw.partition(b"\r\n\r\n")
    if isinstance(event, Continue):
        assert (head[:13], body) == (b"HTTP/1.1 100 ", b"")
    else:
        assert head.startswith(b"HTTP/1.1 400 \r\n")
        assert head.endswith(b"Content-Length: %d" % len(body))


def mutate(noise: random.Random) -> bytes:
    stream = bytearray(b"".join(noise.choices(SEEDS, k=noise.randrange(1, 5))))
    for _ in range(noise.randrange(4)):
        place = noise.randrange(len(stream))
        match noise.randrange(4):
            case 0:
                stream[place] = noise.randrange(256)
            case 1:
                del stream[place : place + noise.randrange(1, 20)]
                stream += b"\r\n"
            case 2:
                stream[place:place] = noise.choice((b"\r\n", b"\r", b"\n", b":", b" ", b"\xff", b"9" * 11))
            case _:
                stream[place:place] = noise.randbytes(noise.randrange(1, 40))
    return noise.randbytes(MOST_PIECES) + bytes(stream)


def run_plain(runs: int, seed: int, seconds: float | None) -> int:
    """Run without atheris; return how many inputs were tried. The failing input is printed."""
    noise = random.Random(seed)
    deadline = None if seconds is None else time.monotonic() + seconds
    for number in range(runs):
        if deadline is not None and time.monotonic() > deadline:
            return number
        data = mutate(noise)
        try:
            fuzz_one(data)
        except Exception:
            print(f"run {number}: {data!r}", file=sys.stderr)
            raise
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the HTTP grammar")
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    options, rest = parser.parse_known_args()
    try:
        import atheris
    except ModuleNotFoundError:
        atheris = None
    if atheris is None or options.runs is not None or options.seconds is not None:
        print(f"{run_plain(options.runs or 10**9, options.seed, options.seconds or 60)} inputs held")
        return
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], *rest], fuzz_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
