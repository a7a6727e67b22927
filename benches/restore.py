"""What a restore costs: OnDemand of a small and of a large guest, beside the same done with QEMU by hand.

Two guests, of 256 MiB and of 4 GiB, an eighth of it written to, are saved while they write a word to their
serial port over and over. Each turn restores both, by the server and by QEMU's own commands, up to the first
word that the guest writes. The command line by hand is read off the server's own QEMU (`by_hand.py`).

    python benches/restore.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import by_hand
from bed import running_server
from boot import qemu_of
from cloudvmm.guest.shell import GuestShell
from guest import bench_config, engine_flags
from harness import Report, Series, bench_parser, paired_ratio
from support.vmm import Vmm

MIB = 1024 * 1024
SMALL_MIB = 256
LARGE_MIB = 4096
SIZE_LIMIT = 1.3
RATIO_LIMIT = 1.15
TIMEOUT_S = 300.0
IDLE_S = 2.0
POLL_EVERY_S = 0.0005
WORD = b"tick"


class Bench:
    """One guest's snapshots in `folder`, and what restoring it took so far."""

    def __init__(self, folder: str, ram_mib: int) -> None:
        self.folder = folder
        self.ram_mib = ram_mib
        self.log = Path(folder, "serial")
        self.hand_log = Path(folder, "serial-by-hand")
        self.on_demand = Series(f"OnDemand to the guest's word, {ram_mib} MiB", "ms")
        self.hand = Series(f"the same by hand, {ram_mib} MiB", "ms")
        self.copy = Series(f"Copy to the guest's word, {ram_mib} MiB", "ms")
        self.pss = Series(f"PSS of an idle OnDemand VM, {ram_mib} MiB", "MiB")
        self.command: by_hand.HandCommand | None = None

    def snapshot(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def save(self, vmm: Vmm) -> None:
        """Boot, save the guest idle and at work, and delete it."""
        config = bench_config("qemu", self.folder)
        config |= {"memory": {"size": self.ram_mib * MIB}, "console": {"mode": "Pty"}}
        vmm.put("vm.create", config)
        with _shell(vmm.get("vm.info")) as shell:
            vmm.put("vm.boot")
            shell.wait_ready(TIMEOUT_S)
            eighth = (
                f"mkdir -p /tmp/m; mount -t tmpfs m /tmp/m; head -c {self.ram_mib // 8}m /dev/zero >/tmp/m/f"
            )
            _run(shell, eighth)
            self._save_as(vmm, "idle")
            vmm.put("vm.resume")
            _run(
                shell, f"(while :; do echo {WORD.decode()}; usleep 2000; done) >/dev/ttyS0 2>&1 </dev/null &"
            )
            self._save_as(vmm, "busy")
        vmm.put("vm.delete")

    def _save_as(self, vmm: Vmm, name: str) -> None:
        os.mkdir(self.snapshot(name))
        vmm.put("vm.pause")
        vmm.put("vm.snapshot", {"destination_url": f"file://{self.snapshot(name)}"})

    def restore(self, vmm: Vmm, series: Series | None, *, mode: str) -> None:
        """Restore up to the guest's first word; the VM is left running."""
        self.log.unlink(missing_ok=True)
        started = time.monotonic()
        vmm.put("vm.restore", self._request("busy", mode))
        wait_word(self.log)
        if series is not None:
            series.add((time.monotonic() - started) * 1000)

    def _request(self, name: str, mode: str) -> dict[str, Any]:
        url = f"file://{self.snapshot(name)}"
        return {"source_url": url, "memory_restore_mode": mode, "resume": True}

    def learn_command(self, server_pid: int) -> None:
        """Read off how QEMU was started for the VM that runs."""
        self.command = by_hand.command_of(
            qemu_of(server_pid), self.folder, renamed={str(self.log): str(self.hand_log)}
        )

    def restore_by_hand(self) -> None:
        assert self.command is not None
        self.hand_log.unlink(missing_ok=True)
        started = time.monotonic()
        state = os.path.join(self.snapshot("busy"), "engine-state")
        with by_hand.restored(self.command, state) as process:
            wait_word(self.hand_log, process)
            self.hand.add((time.monotonic() - started) * 1000)

    def measure_memory(self, vmm: Vmm, server_pid: int) -> None:
        vmm.put("vm.restore", self._request("idle", "OnDemand"))
        time.sleep(IDLE_S)
        self.pss.add(pss_mib(qemu_of(server_pid)))
        vmm.put("vm.delete")


def measure(runs: int, folder: str) -> tuple[Bench, Bench]:
    benches = []
    for ram_mib in (SMALL_MIB, LARGE_MIB):
        os.mkdir(os.path.join(folder, str(ram_mib)))
        benches.append(Bench(os.path.join(folder, str(ram_mib)), ram_mib))
    with running_server(folder, engine_flags("qemu")) as (server, vmm):
        for bench in benches:
            bench.save(vmm)
            bench.restore(vmm, None, mode="OnDemand")  # not counted: files come into the page cache
            bench.learn_command(server.pid)
            vmm.put("vm.delete")
        for number in range(runs):
            for bench in benches:
                _take_turns(bench, vmm, is_by_hand_first=bool(number % 2))
        for bench in benches:
            bench.measure_memory(vmm, server.pid)
    return benches[0], benches[1]


def _take_turns(bench: Bench, vmm: Vmm, *, is_by_hand_first: bool) -> None:
    """Restore in both ways; whoever goes second finds the caches warm."""
    if is_by_hand_first:
        bench.restore_by_hand()
    bench.restore(vmm, bench.on_demand, mode="OnDemand")
    vmm.put("vm.delete")
    if not is_by_hand_first:
        bench.restore_by_hand()
    bench.restore(vmm, bench.copy, mode="Copy")
    vmm.put("vm.delete")


@contextlib.contextmanager
def _shell(info: dict[str, Any]) -> Iterator[GuestShell]:
    """Talk to the guest over the PTY of its console."""
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(info["config"]["console"]["file"], flags)
    try:
        yield GuestShell(fd)
    finally:
        os.close(fd)


def _run(shell: GuestShell, script: str) -> None:
    status, output = shell.run(script, timeout_s=TIMEOUT_S)
    if status:
        raise SystemExit(f"{script!r} failed in the guest: {output!r}")


def pss_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"The kernel tells no PSS of process {pid}")
    return int(found[1]) / 1024


def own_mib(pid: int, *, sharers: int) -> float:
    """Return what a guest costs: PSS, and all of the memory that its RAM is in, divided by `sharers`."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    kib = 0.0
    files: dict[int, int] = {}
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", text)[1:]:
        sizes = {name: int(size) for name, size in re.findall(r"(?m)^(\w+):\s+(\d+) kB$", mapping)}
        words = mapping.split("\n", 1)[0].split()
        if "/memfd:cloudvmm" not in mapping:
            kib += sizes["Pss"]
            continue
        kib += sizes["Anonymous"]
        files[int(words[4])] = os.stat(f"/proc/{pid}/map_files/{words[0]}").st_blocks // 2
    return (kib + sum(files.values()) / sharers) / 1024


def wait_word(log: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not (log.exists() and WORD in log.read_bytes()):
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise SystemExit(f"No guest goes on; its log: {log.read_bytes() if log.exists() else b''!r}")
        time.sleep(POLL_EVERY_S)


def main() -> None:
    options = bench_parser(__doc__, runs=15).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = measure(options.runs, folder)
    report = Report("Restore of the default guest: OnDemand beside QEMU by hand")
    for bench in (small, large):
        report.add(bench.on_demand, bench.hand, bench.copy, bench.pss)
    report.claim(
        f"OnDemand: {LARGE_MIB} MiB over {SMALL_MIB} MiB, median of the pairs",
        paired_ratio(large.on_demand, small.on_demand),
        limit=SIZE_LIMIT,
        unit="x",
    )
    for bench in (small, large):
        report.claim(
            f"OnDemand of {bench.ram_mib} MiB: server over by hand, median of the pairs",
            paired_ratio(bench.on_demand, bench.hand),
            limit=RATIO_LIMIT,
            unit="x",
        )
    if large.command is not None:
        report.note(f"By hand: {' '.join(large.command.argv)}")
    report.publish(options.json)


if __name__ == "__main__":
    main()
