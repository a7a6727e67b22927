"""A guest saved and taken up again, beside libvirt's `save` and `restore` of the same guest.

The guest writes a word to its serial port over and over. Saving is measured to the answer (pause and
snapshot; libvirt ends the guest besides, as its `save` does), taking up to the first word that the guest
writes afterwards. Here memory comes on demand, and by copy; libvirt always reads all of it.

    python benches/saved.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bed import running_server
from cloudvmm.guest.shell import GuestShell
from guest import KERNEL_CMDLINE, RAM_BYTES, bench_config, engine_flags
from harness import Report, Series, bench_parser
from hotplug import READY_TIMEOUT_S, opened_shell
from peer_libvirt import NAME, Libvirt, libvirt, missing
from restore import WORD, wait_word
from support.vmm import Vmm

TALK = f"(while :; do echo {WORD.decode()}; usleep 2000; done) >/dev/ttyS0 2>&1 </dev/null &"
TIMEOUT_S = 60.0
MIB = 1024 * 1024


class Turns:
    """The series of the turns taken so far."""

    def __init__(self) -> None:
        self.save = Series("pause and snapshot, server", "ms")
        self.on_demand = Series("restore on demand to the guest's word, server", "ms")
        self.copy = Series("restore by copy to the guest's word, server", "ms")
        self.libvirt_save = Series("save, libvirt", "ms")
        self.libvirt_restore = Series("restore to the guest's word, libvirt", "ms")


def take_turn(vmm: Vmm, folder: str, log: Path, turns: Turns) -> None:
    snapshot = os.path.join(folder, "snapshot")
    shutil.rmtree(snapshot, ignore_errors=True)
    os.mkdir(snapshot)
    url = f"file://{snapshot}"
    started = time.monotonic()
    vmm.put("vm.pause")
    vmm.put("vm.snapshot", {"destination_url": url})
    turns.save.add((time.monotonic() - started) * 1000)
    # On demand last: the next turn would save what stands on this turn's files.
    for mode, series in (("OnDemand", turns.on_demand), ("Copy", turns.copy)):
        vmm.put("vm.delete")
        log.unlink(missing_ok=True)
        started = time.monotonic()
        vmm.put("vm.restore", {"source_url": url, "memory_restore_mode": mode, "resume": True})
        wait_word(log)
        series.add((time.monotonic() - started) * 1000)


def take_turn_by_libvirt(session: Libvirt, turns: Turns) -> None:
    saved = os.path.join(session.folder, "run", "saved")
    started = time.monotonic()
    session.ask(f"save {NAME} {saved}")
    turns.libvirt_save.add((time.monotonic() - started) * 1000)
    session.serial.unlink(missing_ok=True)
    started = time.monotonic()
    session.ask(f"restore {saved}")
    wait_word(session.serial)
    turns.libvirt_restore.add((time.monotonic() - started) * 1000)


def have_talk(shell: GuestShell) -> None:
    shell.wait_ready(READY_TIMEOUT_S)
    status, output = shell.run(TALK, timeout_s=TIMEOUT_S)
    if status:
        raise SystemExit(f"The guest does not talk: {output!r}")


@contextlib.contextmanager
def talking_guest(folder: str) -> Iterator[Vmm]:
    """Run a server with a guest that talks; its console goes on, with nobody at its other end."""
    with running_server(folder, engine_flags("qemu")) as (_, vmm):
        vmm.put("vm.create", bench_config("qemu", folder) | {"console": {"mode": "Pty"}})
        with opened_shell(vmm.get("vm.info")["config"]["console"]["file"]) as shell:
            vmm.put("vm.boot")
            have_talk(shell)
        yield vmm


@contextlib.contextmanager
def talking_guest_of_libvirt() -> Iterator[Libvirt | None]:
    with libvirt() as session:
        if session is not None:
            session.create(session.domain(ram_bytes=RAM_BYTES, cmdline=KERNEL_CMDLINE, has_console=True))
            with opened_shell(session.console()) as shell:
                have_talk(shell)
        yield session


def main() -> None:
    options = bench_parser(__doc__, runs=7).parse_args()
    turns = Turns()
    with (
        tempfile.TemporaryDirectory() as folder,
        talking_guest(folder) as vmm,
        talking_guest_of_libvirt() as session,
    ):
        log = Path(folder, "serial")
        for number in range(options.runs + 1):
            into = turns if number else Turns()  # the first is not counted: what is rare is imported now
            take_turn(vmm, folder, log, into)
            if session is not None:
                take_turn_by_libvirt(session, into)
    report = Report(f"A guest of {RAM_BYTES // MIB} MiB saved and taken up again, beside libvirt")
    report.add(turns.save, turns.on_demand, turns.copy)
    bars = [turns.save, turns.on_demand, turns.copy]
    if session is None:
        report.note(f"libvirt: not measured; {missing()}")
    else:
        report.add(turns.libvirt_save, turns.libvirt_restore)
        report.ratio(turns.save, turns.libvirt_save)
        report.ratio(turns.on_demand, turns.libvirt_restore)
        report.ratio(turns.copy, turns.libvirt_restore)
        bars += [turns.libvirt_save, turns.libvirt_restore]
    report.bars("saved", "A guest saved and taken up again, median", *bars)
    report.publish(options.json)


if __name__ == "__main__":
    main()
