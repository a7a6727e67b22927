"""What the server adds to a boot: create+boot through REST beside QEMU by hand, and beside libvirt with QEMU.

The command line by hand is read off the server's own QEMU (`by_hand.py`). libvirt makes a machine of its own
for the same kernel and initramfs, from a description that leaves to it what it has a default for
(`peer_libvirt.py`). All boot the default guest to its ready line, in turns. Then the time before QEMU runs:
from the request for `vm.boot` to its answer, which comes when the vCPUs have been let go, beside starting the
same QEMU and letting its vCPUs go over QMP.

    python benches/boot.py [--runs N] [--no-libvirt] [--json FILE]
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from pathlib import Path

import by_hand
from bed import processor_s, running_server
from guest import KERNEL_CMDLINE, RAM_BYTES, READY_WORDS, bench_config, engine_flags
from harness import RATIO, Report, Series, bench_parser, difference, paired_ratio, ratio
from peer_libvirt import Libvirt, libvirt, missing
from support.process import descendants_of
from support.vmm import Vmm

STARTS_PER_RUN = 4
RATIO_LIMIT = 1.02
LIBVIRT_LIMIT = 0.8
BEFORE_LIMIT_MS = 40.0
READY_TIMEOUT_S = 120.0
POLL_EVERY_S = 0.001


class Turns:
    """The series of the turns taken so far."""

    def __init__(self) -> None:
        self.ready = Series("create+boot to ready, server", "s")
        self.ready_by_hand = Series("start to ready, by hand", "s")
        self.ready_by_libvirt = Series("virsh create to ready, libvirt", "s")
        self.work = Series("processor time of it, QEMU and server", "s")
        self.work_by_hand = Series("processor time of it, by hand", "s")
        self.create = Series("vm.create", "ms")
        self.boot = Series("vm.boot to vCPUs running, server", "ms")
        self.boot_work = Series("processor time of it, server alone", "ms")
        self.boot_by_hand = Series("start to vCPUs running, by hand", "ms")


def boot_by_server(vmm: Vmm, server_pid: int, folder: str, turns: Turns) -> None:
    """Create, boot, wait for the guest; the VM is left running."""
    log = _fresh_log(folder)
    config = bench_config("qemu", folder)
    worked_s = processor_s(server_pid)
    started = time.monotonic()
    vmm.put("vm.create", config)
    created = time.monotonic()
    vmm.put("vm.boot")
    wait_ready(log)
    turns.ready.add(time.monotonic() - started)
    turns.work.add(processor_s(qemu_of(server_pid)) + processor_s(server_pid) - worked_s)
    turns.create.add((created - started) * 1000)


def boot_by_hand(command: by_hand.HandCommand, folder: str, turns: Turns) -> None:
    log = _fresh_log(folder, name="serial-by-hand")
    started = time.monotonic()
    process = by_hand.start(command.argv)
    try:
        wait_ready(log, process)
        turns.ready_by_hand.add(time.monotonic() - started)
        turns.work_by_hand.add(processor_s(process.pid))
    finally:
        by_hand.end(process)


def boot_by_libvirt(session: Libvirt, domain: str, turns: Turns) -> None:
    started = time.monotonic()
    session.create(domain)
    wait_ready(session.serial)
    turns.ready_by_libvirt.add(time.monotonic() - started)
    session.destroy()


def measure(runs: int, *, has_libvirt: bool) -> tuple[Turns, by_hand.HandCommand]:
    turns = Turns()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(folder, engine_flags("qemu")) as (server, vmm),
        libvirt() if has_libvirt else contextlib.nullcontext() as session,
    ):
        # Not counted: with its first QEMU the server also looks at what QEMU can do.
        boot_by_server(vmm, server.pid, folder, Turns())
        serial = os.path.join(folder, "serial")
        command = by_hand.command_of(
            qemu_of(server.pid), folder, renamed={serial: os.path.join(folder, "serial-by-hand")}
        )
        vmm.put("vm.delete")
        if session is not None:
            domain = session.domain(ram_bytes=RAM_BYTES, cmdline=KERNEL_CMDLINE)
            boot_by_libvirt(session, domain, Turns())
        for number in range(runs):
            # Whoever goes second finds the caches warm and the processors as the first left them.
            if number % 2:
                boot_by_hand(command, folder, turns)
            boot_by_server(vmm, server.pid, folder, turns)
            vmm.put("vm.delete")
            if not number % 2:
                boot_by_hand(command, folder, turns)
            if session is not None:
                boot_by_libvirt(session, domain, turns)
        start_in_turns(vmm, server.pid, folder, command, turns, runs=runs * STARTS_PER_RUN)
    return turns, command


def start_in_turns(
    vmm: Vmm, server_pid: int, folder: str, command: by_hand.HandCommand, turns: Turns, *, runs: int
) -> None:
    """Only start QEMU and let its vCPUs go; often, for the noise is as large as what is looked for."""
    vmm.put("vm.create", bench_config("qemu", folder))
    for _ in range(runs):
        worked_s, started = processor_s(server_pid), time.monotonic()
        vmm.put("vm.boot")
        turns.boot.add((time.monotonic() - started) * 1000)
        turns.boot_work.add((processor_s(server_pid) - worked_s) * 1000)
        vmm.put("vm.shutdown")
        turns.boot_by_hand.add(by_hand.run_until_continued(command) * 1000)
    vmm.put("vm.delete")


def qemu_of(server_pid: int) -> int:
    found = [child.pid for child in descendants_of(server_pid) if "qemu-system" in child.command]
    if len(found) != 1:
        raise SystemExit(f"The server runs {len(found)} QEMUs instead of one")
    return found[0]


def _fresh_log(folder: str, name: str = "serial") -> Path:
    log = Path(folder, name)
    log.unlink(missing_ok=True)
    return log


def wait_ready(log: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not (log.exists() and READY_WORDS in log.read_bytes()):
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            raise SystemExit(f"No guest came up; its log: {log.read_bytes() if log.exists() else b''!r}")
        time.sleep(POLL_EVERY_S)


def main() -> None:
    parser = bench_parser(__doc__, runs=9)
    parser.add_argument("--no-libvirt", action="store_true", help="measure without libvirt")
    options = parser.parse_args()
    turns, command = measure(options.runs, has_libvirt=not options.no_libvirt)
    before = difference(turns.boot, turns.boot_by_hand, "vm.boot - by hand")
    report = Report("Boot of the default guest: the server beside QEMU by hand")
    report.add(turns.ready, turns.ready_by_hand, turns.work, turns.work_by_hand)
    report.add(turns.create, turns.boot, turns.boot_work, turns.boot_by_hand, before)
    report.claim(
        "ready: median of server / by hand",
        ratio(turns.ready, turns.ready_by_hand),
        limit=RATIO_LIMIT,
        unit=RATIO,
    )
    bars = [turns.ready, turns.ready_by_hand]
    if turns.ready_by_libvirt.values:
        report.add(turns.ready_by_libvirt)
        bars.append(turns.ready_by_libvirt)
        report.claim(
            "ready: median of server / libvirt",
            ratio(turns.ready, turns.ready_by_libvirt),
            limit=LIBVIRT_LIMIT,
            unit=RATIO,
        )
        pairs = paired_ratio(turns.ready, turns.ready_by_libvirt)
        report.note(f"ready, median of the pairs' ratios to libvirt: {pairs:.3f}")
    else:
        report.note(f"libvirt: not measured; {missing() or 'it was not wanted'}")
    report.bars("boot", "Start to a guest that is ready, median", *bars)
    report.claim("before the vCPUs run: server - by hand", before.median, limit=BEFORE_LIMIT_MS, unit="ms")
    report.note(f"ready, median of the pairs' ratios: {paired_ratio(turns.ready, turns.ready_by_hand):.3f}")
    report.note(f"processor time, median over median: {ratio(turns.work, turns.work_by_hand):.3f}")
    report.note(f"By hand: {' '.join(command.argv)}")
    report.publish(options.json)


if __name__ == "__main__":
    main()
