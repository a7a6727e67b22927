"""What `vmm.ping` costs over a bare echo on the same kind of socket.

Both servers are Python, each in its own process, with a thread per connection; the client is the same and
takes turns between them, so that a busy machine disturbs both alike. The VMM thread behind the REST server
is as small as one can be, so what is measured is HTTP and the channel. Prints one line of JSON, microseconds.

    python benches/ping_overhead.py [--rounds N] [--limit-us 60]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cloudvmm.api import EventFd, VmmPingResponse, api_channel
from cloudvmm.http import start_http_path_thread

PING = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"
BATCH = 100


def serve_echo(path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        client, _ = listener.accept()
        threading.Thread(target=echo, args=(client,), daemon=True).start()


def echo(client: socket.socket) -> None:
    while piece := client.recv(16384):
        client.sendall(piece)


def serve_rest(path: str) -> None:
    sender, receiver = api_channel()
    event = EventFd()
    start_http_path_thread(path, event, sender)
    pong = VmmPingResponse(
        build_version="v54.0.0", version="54.0.0", pid=os.getpid(), features=["io_uring", "kvm"]
    )
    poller = select.epoll()
    poller.register(event, select.EPOLLIN)
    while True:
        poller.poll()
        for _ in range(event.read()):
            request = receiver.take()
            if request is not None:
                request.reply.send(pong)


@contextlib.contextmanager
def server(serve: Callable[[str], None], path: str) -> Iterator[socket.socket]:
    """Run `serve` in a child process; give a connection to it."""
    pid = os.fork()
    if pid == 0:
        serve(path)
    try:
        yield connect(path, deadline_s=10)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def connect(path: str, *, deadline_s: float) -> socket.socket:
    deadline = time.monotonic() + deadline_s
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(path)
        except OSError:
            client.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return client


def exchange(client: socket.socket, end: bytes) -> int:
    """Return the nanoseconds from the first byte out to the last byte in."""
    started = time.perf_counter_ns()
    client.sendall(PING)
    answer = client.recv(16384)
    while not answer.endswith(end):
        answer += client.recv(16384)
    return time.perf_counter_ns() - started


def measure(rounds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("echo", "rest")]
        with server(serve_echo, paths[0]) as plain, server(serve_rest, paths[1]) as rest:
            samples: dict[str, list[int]] = {"echo": [], "ping": []}
            for _ in range(max(1, rounds // BATCH)):
                samples["echo"] += [exchange(plain, b"\r\n\r\n") for _ in range(BATCH)]
                samples["ping"] += [exchange(rest, b"}") for _ in range(BATCH)]
            plain.close()
            rest.close()
    return summary(samples)


def summary(samples: dict[str, list[int]]) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, values in samples.items():
        cuts = statistics.quantiles(values, n=100)
        result[f"{name}_p50_us"] = round(cuts[49] / 1000, 1)
        result[f"{name}_p99_us"] = round(cuts[98] / 1000, 1)
    result["overhead_p50_us"] = round(result["ping_p50_us"] - result["echo_p50_us"], 1)
    result["ratio_p50"] = round(result["ping_p50_us"] / result["echo_p50_us"], 2)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5000)
    parser.add_argument("--limit-us", type=float, default=None, help="fail if the overhead at p50 is larger")
    options = parser.parse_args()
    result = measure(options.rounds)
    print(json.dumps(result))
    return int(options.limit_us is not None and result["overhead_p50_us"] > options.limit_us)


if __name__ == "__main__":
    sys.exit(main())
