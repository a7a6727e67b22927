"""How many calls are answered by the number of connections, and how long one then takes.

Each connection is a client process of its own that asks without pause, so that what is counted is the server
and not a client's interpreter. Beside it a bare echo, which is plain Python with a thread per connection as
well, and the real Cloud Hypervisor where it is named.

    python benches/throughput.py [--runs N] [--cloud-hypervisor PATH] [--json FILE]
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence

from api_latency import PEER
from bed import SMALL_CONFIG, Probe, child_process, echo_server, running_server
from harness import Chart, Report, Series, add_peer_option, bench_parser, note_peer

CONNECTIONS = (1, 2, 4, 8)
SECONDS = 0.5
COMMANDS = ("vmm.ping", "vm.info")
_PLACES = 65536  # latencies that a client keeps, at most


class Client:
    """A process that asks on one connection; its numbers are in memory that both see."""

    def __init__(self, path: str, command: str) -> None:
        self.path = path
        self.command = command
        self.memory = mmap.mmap(-1, 8 * (_PLACES + 1))

    def run(self) -> None:
        """Ask until killed."""
        probe = Probe(self.path, "GET", self.command)
        done = 0
        while True:
            took_us = probe.timed_us()
            struct.pack_into("d", self.memory, 8 * (1 + done % _PLACES), took_us)
            done += 1
            struct.pack_into("q", self.memory, 0, done)

    @property
    def done(self) -> int:
        return int(struct.unpack_from("q", self.memory)[0])

    def latencies_us(self, begun: int, ended: int) -> list[float]:
        return [
            struct.unpack_from("d", self.memory, 8 * (1 + number % _PLACES))[0]
            for number in range(max(begun, ended - _PLACES), ended)
        ]


def measure(path: str, command: str, connections: int, seconds: float) -> tuple[float, list[float]]:
    """Return the calls per second and what each took, in microseconds."""
    clients = [Client(path, command) for _ in range(connections)]
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.enter_context(child_process(client.run))
        while not all(client.done for client in clients):
            time.sleep(0.001)
        begun, started = [client.done for client in clients], time.monotonic()
        time.sleep(seconds)
        ended, took_s = [client.done for client in clients], time.monotonic() - started
    latencies = [
        took
        for client, first, last in zip(clients, begun, ended, strict=True)
        for took in client.latencies_us(first, last)
    ]
    for client in clients:
        client.memory.close()
    return (sum(ended) - sum(begun)) / took_s, latencies


@contextlib.contextmanager
def places(peer: str | None) -> Iterator[dict[str, str]]:
    """Run everything that is asked; give the sockets by their names."""
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(3)]
        found = {"echo": stack.enter_context(echo_server(folders[0]))}
        _, vmm = stack.enter_context(running_server(folders[1], ["--engine", "fake"]))
        vmm.put("vm.create", SMALL_CONFIG)
        found["cloudvmm"] = vmm.path
        if peer is not None:
            _, vmm = stack.enter_context(running_server(folders[2], [], binary=peer))
            vmm.put("vm.create", SMALL_CONFIG)
            found[PEER] = vmm.path
        yield found


def fill(
    report: Report, rates: dict[tuple[str, int], list[float]], chart: Chart, names: Sequence[str]
) -> None:
    for name in names:
        points = []
        for connections in CONNECTIONS:
            series = Series(f"{name}, {connections} connections", "calls/s", rates[name, connections])
            report.add(series)
            points.append((float(connections), series.median))
        chart.add(name, points)


def main() -> None:
    parser = bench_parser(__doc__, runs=5)
    add_peer_option(parser)
    options = parser.parse_args()
    report = Report("API throughput by connections, fake engine")
    note_peer(report, options.cloud_hypervisor)
    for command in COMMANDS:
        rates: dict[tuple[str, int], list[float]] = {}
        latencies: dict[tuple[str, int], list[float]] = {}
        with places(options.cloud_hypervisor) as sockets:
            for _ in range(options.runs):
                for connections in CONNECTIONS:
                    for name, path in sockets.items():
                        rate, took = measure(path, command, connections, SECONDS)
                        rates.setdefault((f"{command}, {name}", connections), []).append(rate)
                        latencies.setdefault((name, connections), []).extend(took)
        names = [f"{command}, {name}" for name in sockets]
        chart = report.chart(
            f"throughput_{command.partition('.')[2]}",
            f"{command}: calls per second",
            "calls/s",
            along="connections",
        )
        fill(report, rates, chart, names)
        for connections in CONNECTIONS:
            report.add(
                Series(
                    f"{command} latency, {connections} connections", "us", latencies["cloudvmm", connections]
                )
            )
            if PEER in sockets:
                report.add(Series(f"the same, {PEER}", "us", latencies[PEER, connections]))
    report.note(f"{os.cpu_count()} processors for clients and server together")
    report.publish(options.json)


if __name__ == "__main__":
    main()
