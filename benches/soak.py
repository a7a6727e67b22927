"""Several VMs under a mixed load for as long as is asked: what leaks, what fails, and how long a ping takes.

Each VM is a server of its own and lives one life after another: created with a few disks, booted, then
paused, resized, snapshotted, dumped, given devices and relieved of them in random order, and deleted. Between
two lives its server must hold what it held before: descriptors, threads and children to the last one, memory
within a margin. Meanwhile another process pings all servers in turn, and an echo beside them.

    python benches/soak.py [--engine fake|qemu] [--vms N] [--seconds N] [--pause SECONDS] [--seed N]
                           [--json FILE]

An emulated guest takes a processor for more than a second while it boots. So a VM waits between two calls for
as long as two processors need for the guests of four; with `--pause 0.4` they have more to do than they can,
and what a ping then takes is the turn of a thread at a processor, several times over.

Ends with status 1 if anything leaked or failed. The first third is warm-up.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bed import Probe, child_process, connect, echo_server, end_server, start_server
from guest import bench_config, engine_flags
from harness import Report, Series, bench_parser
from support.leak import children_of
from support.vmm import Vmm

MIB = 1024 * 1024
PAUSE_S = {"fake": 0.05, "qemu": 2.0}  # between two calls of one VM
PING_EVERY_S = 0.01
ROUNDS = 100_000  # at most
PING_LIMIT_MS = 5.0
RSS_MARGIN_MIB = 2.0  # a MiB of events, which are kept on purpose, and an arena of the allocator
CALLS_PER_LIFE = (5, 25)
MOST_DISKS = 4
SETTLE_S = 10.0
LAST_WORDS = 3_000  # characters of a log


class Held(NamedTuple):
    """What a server holds between two lives."""

    descriptors: int
    threads: int
    children: int
    rss_mib: float

    @classmethod
    def of(cls, pid: int) -> Held:
        status = Path(f"/proc/{pid}/status").read_text().split("\n")
        numbers = dict(line.split(":\t") for line in status if line)
        return cls(
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=int(numbers["Threads"]),
            children=len(children_of(pid)),
            rss_mib=int(numbers["VmRSS"].split()[0]) / 1024,
        )


class Life:
    """One VM's lives, in a thread of their own, until `stop` is set. Owns the server."""

    def __init__(self, engine: str, folder: str, seed: int, *, pause_s: float, stop: threading.Event) -> None:
        self.engine = engine
        self.folder = folder
        self.process, path = start_server(folder, engine_flags(engine))
        self.vmm = Vmm(path)
        self.path = path
        self.calls: Counter[str] = Counter()
        self.failures: list[str] = []
        self.held: list[tuple[float, Held]] = []
        self._noise = random.Random(seed)
        self._pause_s = pause_s
        self._stop = stop
        self._files = 0
        self._thread = threading.Thread(target=self._run, name=f"life {seed}")

    def start(self) -> None:
        connect(self.path).close()
        self._thread.start()

    def join(self) -> None:
        self._thread.join()
        self.vmm.close()
        end_server(self.process)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._live()
                self.held.append((time.monotonic(), self._settled()))
        except Exception as error:  # the other VMs live on; this one is told of
            self.failures.append(f"{type(error).__name__}: {error}\n{self._last_words()}")

    def _last_words(self) -> str:
        """What the server and the guest said last."""
        logs = [path for name in ("stderr", "serial") if (path := Path(self.folder, name)).exists()]
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-LAST_WORDS:]}" for log in logs)

    def _live(self) -> None:
        disks = [self._disk() for _ in range(self._noise.randrange(3))]
        config = bench_config(self.engine, self.folder)
        cpus = {"boot_vcpus": 1, "max_vcpus": 2}
        memory = {"size": 256 * MIB, "hotplug_method": "VirtioMem", "hotplug_size": 256 * MIB}
        self._call("vm.create", {**config, "cpus": cpus, "memory": memory, "disks": disks})
        self._call("vm.boot")
        for _ in range(self._noise.randrange(*CALLS_PER_LIFE)):
            if self._stop.wait(self._pause_s):
                break
            getattr(self, self._noise.choice(_ACTS))()
        self._call("vm.delete")
        for file in Path(self.folder).glob("made*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _settled(self) -> Held:
        """Return what is held, as soon as it is no more than before; an end may take `SETTLE_S`."""
        deadline = time.monotonic() + SETTLE_S
        before = self.held[-1][1] if self.held else None
        while True:
            held = Held.of(self.process.pid)
            if before is None or held[:3] <= before[:3] or time.monotonic() > deadline:
                return held
            time.sleep(0.01)

    # What a VM goes through. Each leaves it running.

    def look(self) -> None:
        for command in ("vm.info", "vm.counters"):
            self.calls[command] += 1
            self.vmm.get(command)

    def pause(self) -> None:
        self._call("vm.pause")
        self._call("vm.resume")

    def dump(self) -> None:
        path = self._path()
        self._call("vm.coredump", {"destination_url": f"file://{path}"})
        path.unlink()

    def save(self) -> None:
        folder = self._path()
        folder.mkdir()
        self._call("vm.pause")
        self._call("vm.snapshot", {"destination_url": f"file://{folder}"})
        if self._noise.random() < 0.5:
            self._call("vm.delete")
            self._call("vm.restore", {"source_url": f"file://{folder}"})
        self._call("vm.resume")
        shutil.rmtree(folder)

    def plug(self) -> None:
        disks = self.vmm.get("vm.info")["config"].get("disks") or []
        if len(disks) < MOST_DISKS:
            self._call("vm.add-disk", self._disk())
        elif self.engine == "fake":  # a guest that still boots does not let go
            self._call("vm.remove-device", {"id": self._noise.choice(disks)["id"]})

    def grow(self) -> None:
        present = self.vmm.get("vm.info")["config"]["memory"].get("hotplugged_size") or 0
        room = self._noise.choice([size for size in (0, 64 * MIB, 128 * MIB) if size != present])
        self._call("vm.resize", {"desired_ram": 256 * MIB + room})

    def reboot(self) -> None:
        self._call("vm.reboot")

    def boot_again(self) -> None:
        self._call("vm.shutdown")
        self._call("vm.boot")

    def _call(self, command: str, data: Any = None) -> None:
        self.calls[command] += 1
        self.vmm.put(command, data)

    def _disk(self) -> dict[str, Any]:
        path = self._path()
        path.write_bytes(bytes(MIB))
        return {"path": str(path), "image_type": "Raw"}

    def _path(self) -> Path:
        self._files += 1
        return Path(self.folder, f"made{self._files}")


_ACTS = ("look", "look", "look", "pause", "dump", "save", "plug", "plug", "grow", "reboot", "boot_again")


def leaks(held: Sequence[tuple[float, Held]]) -> list[str]:
    """Say what there was more of in the last third than in the one before; nothing of too few lives."""
    third = len(held) // 3
    if third == 0:
        return []
    before, after = ([one for _, one in part] for part in (held[third : 2 * third], held[-third:]))
    found = []
    for name in ("descriptors", "threads", "children"):
        first, last = (min(getattr(one, name) for one in part) for part in (before, after))
        if last > first:
            found.append(f"{name}: {last} after {first}")
    first_mib, last_mib = (statistics.median(one.rss_mib for one in part) for part in (before, after))
    if last_mib > first_mib + RSS_MARGIN_MIB:
        found.append(f"memory: {last_mib:.1f} MiB after {first_mib:.1f}")
    return found


def ping(paths: Sequence[str], results: mmap.mmap) -> None:
    """Ping who listens at `paths` in turn, for ever; `results` holds their number and milliseconds."""
    probes = [Probe(path, "GET", "vmm.ping") for path in paths]
    numbers = memoryview(results).cast("d")
    for done in range(ROUNDS):
        for at, probe in enumerate(probes, 1 + done * len(probes)):
            numbers[at] = probe.timed_us() / 1000
        numbers[0] = done + 1
        time.sleep(PING_EVERY_S)
    threading.Event().wait()


def soak(
    engine: str, vms: int, seconds: float, seed: int, *, pause_s: float
) -> tuple[list[Life], Series, Series]:
    """Let `vms` VMs live for `seconds`, with `pause_s` between two calls of one.

    Return them, ended, and the milliseconds of the pings meanwhile, and those of a bare echo among them: what
    this machine's scheduler leaves to anybody.
    """
    stop = threading.Event()
    with contextlib.ExitStack() as stack, mmap.mmap(-1, 8 * (ROUNDS * (vms + 1) + 1)) as results:
        lives = []
        for number in range(vms):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            lives.append(Life(engine, folder, seed + number, pause_s=pause_s, stop=stop))
        for life in lives:
            connect(life.path).close()
        echo = stack.enter_context(echo_server(stack.enter_context(tempfile.TemporaryDirectory())))
        with child_process(lambda: ping([*(life.path for life in lives), echo], results)):
            for life in lives:
                life.start()
            stop.wait(seconds)
            stop.set()
        for life in lives:
            life.join()
        numbers = array.array("d", results[:])
    times = numbers[1 : int(numbers[0]) * (vms + 1) + 1].tolist()
    echoes = times[vms :: vms + 1]
    del times[vms :: vms + 1]
    return lives, Series("vmm.ping", "ms", times), Series("bare echo", "ms", echoes)


def main() -> None:
    parser = bench_parser(__doc__, runs=1)
    parser.add_argument("--engine", choices=("fake", "qemu"), default="fake")
    parser.add_argument("--vms", type=int, help="20 on the fake engine, 4 on QEMU")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--pause", type=float, help="seconds between two calls of one VM")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    vms = options.vms or (20 if options.engine == "fake" else 4)
    pause_s = PAUSE_S[options.engine] if options.pause is None else options.pause
    lives, pings, echoes = soak(options.engine, vms, options.seconds, options.seed, pause_s=pause_s)
    report = Report(f"Soak of {vms} VMs for {options.seconds:g} s, engine {options.engine}")
    report.add(pings, echoes)
    report.add(Series("RSS between lives", "MiB", [one.rss_mib for life in lives for _, one in life.held]))
    report.claim("p99 of vmm.ping", pings.p99, limit=PING_LIMIT_MS, unit="ms")
    report.note(f"p99 of vmm.ping / bare echo: {pings.p99 / echoes.p99:.2f}")
    calls = sum((life.calls for life in lives), Counter[str]())
    report.note(f"{pause_s:g} s between two calls of one VM")
    report.note(f"{sum(len(life.held) for life in lives)} lives, {calls.total()} calls: {dict(calls)}")
    wrong = [f"VM {at}: {words}" for at, life in enumerate(lives) for words in life.failures]
    wrong += [f"VM {at}: leaks {words}" for at, life in enumerate(lives) for words in leaks(life.held)]
    for words in wrong or ["nothing leaked, nothing failed"]:
        report.note(words)
    report.publish(options.json)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
