"""What a fork costs: ten clones of a guest of 1 GiB beside ten QEMUs that restore it by hand together.

The guest, an eighth of its memory written to, writes a word to its serial port over and over. Each turn makes
ten clones of it by one `vm.fork`, and ten QEMUs that go on from a snapshot of it, up to the last one's first
word. The command line by hand is read off the server's own QEMU (`by_hand.py`). Then an idle guest is forked.

    python benches/fork.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import by_hand
from bed import running_server
from guest import engine_flags
from harness import Report, Series, bench_parser, paired_ratio
from restore import IDLE_S, MIB, Bench, own_mib, wait_word
from support.fork import CloneVm
from support.process import descendants_of
from support.vmm import Vmm

RAM_MIB = 1024
CLONES = 10
RATIO_LIMIT = 1.25
PAUSE_LIMIT_MS = 100
PSS_LIMIT = 0.25


class ForkBench:
    """Snapshots of the guest are in `bench`; clones and what is by hand are in `folder`."""

    def __init__(self, folder: str, bench: Bench) -> None:
        self.folder = folder
        self.bench = bench
        self.forks = Series(f"{CLONES} forks to the last one's word, {RAM_MIB} MiB", "ms")
        self.hand = Series(f"{CLONES} restores by hand, together", "ms")
        self.pause = Series("the guest stood still for it", "ms")
        self.idle_pause = Series("an idle guest stood still", "ms")
        self.clone_pss = Series(f"memory of an idle clone, one of {CLONES}", "MiB")
        self.copy_pss = Series("memory of an idle VM restored by copy", "MiB")
        self._folders = 0

    def new_folder(self) -> str:
        self._folders += 1
        path = os.path.join(self.folder, f"turn-{self._folders}")
        os.mkdir(path)
        return path

    def hold(self, vmm: Vmm, name: str) -> None:
        """Have a VM that goes on from the snapshot `name`, with memory of its own."""
        vmm.put("vm.restore", {"source_url": f"file://{self.bench.snapshot(name)}", "resume": True})

    def fork(self, vmm: Vmm) -> None:
        started = time.monotonic()
        clones = self._forked(vmm, self.pause)
        for clone in clones:
            wait_word(Path(clone.folder, "serial.log"))
        self.forks.add((time.monotonic() - started) * 1000)
        for clone in clones:
            clone.end()

    def restore_by_hand(self) -> None:
        folder = self.new_folder()
        state = os.path.join(self.bench.snapshot("busy"), "engine-state")
        commands = [self._own_command(os.path.join(folder, str(number))) for number in range(CLONES)]
        done = threading.Event()
        failures: list[BaseException] = []

        def restore(number: int) -> None:
            log = Path(folder, str(number), "serial")
            try:
                with by_hand.restored(commands[number], state) as process:
                    wait_word(log, process)
                    ready.release()
                    done.wait()
            except BaseException as failure:  # whatever it is, somebody waits for it
                failures.append(failure)
                ready.release()

        ready = threading.Semaphore(0)
        threads = [threading.Thread(target=restore, args=(number,)) for number in range(CLONES)]
        started = time.monotonic()
        try:
            for thread in threads:
                thread.start()
            for _ in threads:
                ready.acquire()
            self.hand.add((time.monotonic() - started) * 1000)
        finally:
            done.set()
            for thread in threads:
                thread.join()
        if failures:
            raise failures[0]

    def measure_idle(self, vmm: Vmm, server_pid: int) -> None:
        """Fork an idle guest, and look at what its clones have for themselves."""
        parent = {child.pid for child in descendants_of(server_pid)}
        time.sleep(IDLE_S)
        for pid in _qemus(server_pid):
            self.copy_pss.add(own_mib(pid, sharers=1))
        clones = self._forked(vmm, self.idle_pause)
        time.sleep(IDLE_S)
        for pid in _qemus(server_pid):
            if pid not in parent:
                self.clone_pss.add(own_mib(pid, sharers=CLONES))
        for clone in clones:
            clone.end()

    def _forked(self, vmm: Vmm, pause: Series) -> list[CloneVm]:
        told: dict[str, Any] = vmm.put("vm.fork", {"directory": self.new_folder(), "count": CLONES})
        pause.add(told["pause_ms"])
        return [CloneVm(clone, has_shell=False) for clone in told["clones"]]

    def _own_command(self, folder: str) -> by_hand.HandCommand:
        """Return the command by hand with its sockets and the log in `folder`."""
        os.mkdir(folder)
        command = self.bench.command
        assert command is not None
        places = {str(self.bench.hand_log): f"{folder}/serial"}
        places |= {f"{self.bench.folder}/{kind}.": f"{folder}/{kind}." for kind in ("qmp", "chr")}
        words = [*command.argv, command.monitor_path]
        for place, own in places.items():
            words = [word.replace(place, own) for word in words]
        return by_hand.HandCommand(words[:-1], words[-1])


def _qemus(server_pid: int) -> list[int]:
    return [child.pid for child in descendants_of(server_pid) if "qemu-system" in child.command]


def measure(runs: int, folder: str) -> ForkBench:
    saved = os.path.join(folder, "saved")
    os.mkdir(saved)
    bench = Bench(saved, RAM_MIB)
    forks = ForkBench(folder, bench)
    with running_server(folder, engine_flags("qemu")) as (server, vmm):
        bench.save(vmm)
        bench.restore(vmm, None, mode="OnDemand")
        bench.learn_command(server.pid)
        vmm.put("vm.delete")
        forks.hold(vmm, "busy")
        for number in range(runs):
            turns = [lambda: forks.fork(vmm), forks.restore_by_hand]
            for turn in turns if number % 2 else reversed(turns):
                turn()
        vmm.put("vm.delete")
        forks.hold(vmm, "idle")
        forks.measure_idle(vmm, server.pid)
        vmm.put("vm.delete")
    return forks


def main() -> None:
    options = bench_parser(__doc__, runs=7).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not without ending what runs by hand
    with tempfile.TemporaryDirectory() as folder:
        forks = measure(options.runs, folder)
    report = Report(f"Forks of the default guest with {RAM_MIB * MIB >> 30} GiB, beside QEMU by hand")
    report.add(forks.forks, forks.hand, forks.pause, forks.idle_pause, forks.clone_pss, forks.copy_pss)
    report.claim(
        f"{CLONES} forks over {CLONES} restores by hand, median of the pairs",
        paired_ratio(forks.forks, forks.hand),
        limit=RATIO_LIMIT,
        unit="x",
    )
    report.claim("The idle guest stood still", forks.idle_pause.median, limit=PAUSE_LIMIT_MS, unit="ms")
    report.claim(
        "Memory of an idle clone over that of a copy",
        forks.clone_pss.median / forks.copy_pss.median,
        limit=PSS_LIMIT,
        unit="x",
    )
    report.publish(options.json)


if __name__ == "__main__":
    main()
