"""How long the hot add of a disk takes: to the answer, and to the guest's block device. libvirt is beside it.

The guest waits for the device in a loop that looks every few milliseconds, which is in its number; so is the
way of its word to us. Each disk is removed again, and gone, before the next is added. libvirt has a guest of
its own, which takes its turns (`peer_libvirt.py`).

    python benches/hotplug.py [--runs N] [--no-libvirt] [--json FILE]
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bed import POLL_EVERY_S, processor_s, running_server
from cloudvmm.guest.shell import GuestShell
from guest import KERNEL_CMDLINE, RAM_BYTES, bench_config, engine_flags
from harness import Report, Series, bench_parser
from peer_libvirt import NAME, Libvirt, libvirt, missing
from support.vmm import Vmm

DISK_BYTES = 64 * 1024 * 1024
ANSWER_LIMIT_MS = 25.0
GUEST_LIMIT_MS = 150.0
READY_TIMEOUT_S = 120.0
TIMEOUT_S = 30.0
WAIT_FOR_DEVICE = "until test -e /sys/block/vda; do usleep 3000; done"
WAIT_FOR_NONE = "until test ! -e /sys/block/vda; do usleep 3000; done"


class Turns:
    """The series of the turns taken so far."""

    def __init__(self) -> None:
        self.answer = Series("vm.add-disk to the answer", "ms")
        self.work = Series("processor time of it, server alone", "ms")
        self.guest = Series("vm.add-disk to the guest's block device", "ms")
        self.removal = Series("vm.remove-device to no block device", "ms")
        self.libvirt_answer = Series("attach-device to the answer, libvirt", "ms")
        self.libvirt_guest = Series("attach-device to the guest's block device, libvirt", "ms")


class Waiter(threading.Thread):
    """Has the guest run `script`, and keeps when it was done."""

    def __init__(self, shell: GuestShell, script: str) -> None:
        super().__init__()
        self._shell = shell
        self._script = script
        self.done_s = 0.0

    def run(self) -> None:
        status, _ = self._shell.run(self._script, timeout_s=TIMEOUT_S)
        if status == 0:
            self.done_s = time.monotonic()


@contextlib.contextmanager
def booted_guest(
    vmm: Vmm, folder: str, config: dict[str, Any], *, serial: str | None = None
) -> Iterator[GuestShell]:
    """Boot a VM of `config`: its console is the shell's, its serial port writes to the file `serial`."""
    port = {"mode": "Null"} if serial is None else {"mode": "File", "file": serial}
    config = config | {"serial": port, "console": {"mode": "Pty"}}
    vmm.put("vm.create", config)
    with opened_shell(vmm.get("vm.info")["config"]["console"]["file"]) as shell:
        vmm.put("vm.boot")
        shell.wait_ready(READY_TIMEOUT_S)
        yield shell


@contextlib.contextmanager
def opened_shell(path: str) -> Iterator[GuestShell]:
    """Talk to a guest over the PTY at `path`."""
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield GuestShell(fd)
    finally:
        os.close(fd)


def timed(shell: GuestShell, script: str, call: Callable[[], object]) -> tuple[float, float]:
    """Do `call` while the guest runs `script`; return the milliseconds to the end of each."""
    waiter = Waiter(shell, script)
    waiter.start()
    started_s = time.monotonic()
    call()
    answered_s = time.monotonic()
    waiter.join()
    if not waiter.done_s:
        raise SystemExit("The guest did not see what was waited for")
    return (answered_s - started_s) * 1000, (waiter.done_s - started_s) * 1000


def add_and_remove(vmm: Vmm, shell: GuestShell, server_pid: int, image: Path, turns: Turns) -> None:
    disk = {"id": "disk", "path": str(image), "image_type": "Raw"}
    worked_s = processor_s(server_pid)
    answer_ms, guest_ms = timed(shell, WAIT_FOR_DEVICE, lambda: vmm.put("vm.add-disk", disk))
    turns.work.add((processor_s(server_pid) - worked_s) * 1000)
    turns.answer.add(answer_ms)
    turns.guest.add(guest_ms)
    _, gone_ms = timed(shell, WAIT_FOR_NONE, lambda: vmm.put("vm.remove-device", {"id": "disk"}))
    turns.removal.add(gone_ms)
    deadline = time.monotonic() + TIMEOUT_S
    while "disk" in vmm.get("vm.info")["device_tree"]:
        if time.monotonic() > deadline:
            raise SystemExit("The disk was not removed")
        time.sleep(POLL_EVERY_S)


@contextlib.contextmanager
def guest_of_libvirt() -> Iterator[tuple[Libvirt, GuestShell] | None]:
    with libvirt() as session:
        if session is None:
            yield None
            return
        session.create(session.domain(ram_bytes=RAM_BYTES, cmdline=KERNEL_CMDLINE, has_console=True))
        with opened_shell(session.console()) as shell:
            shell.wait_ready(READY_TIMEOUT_S)
            yield session, shell


def add_and_remove_by_libvirt(session: Libvirt, shell: GuestShell, turns: Turns) -> None:
    disk = session.disk(DISK_BYTES)
    answer_ms, guest_ms = timed(
        shell, WAIT_FOR_DEVICE, lambda: session.ask(f"attach-device {NAME} {disk} --live")
    )
    turns.libvirt_answer.add(answer_ms)
    turns.libvirt_guest.add(guest_ms)
    timed(shell, WAIT_FOR_NONE, lambda: session.ask(f"detach-device {NAME} {disk} --live"))


def measure(runs: int, *, has_libvirt: bool) -> Turns:
    turns = Turns()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(folder, engine_flags("qemu")) as (server, vmm),
        booted_guest(vmm, folder, bench_config("qemu", folder)) as shell,
        guest_of_libvirt() if has_libvirt else contextlib.nullcontext() as other,
    ):
        image = Path(folder, "image")
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        add_and_remove(vmm, shell, server.pid, image, Turns())  # not counted: what is rare is imported now
        for _ in range(runs):
            add_and_remove(vmm, shell, server.pid, image, turns)
            if other is not None:
                add_and_remove_by_libvirt(*other, turns)
    return turns


def main() -> None:
    parser = bench_parser(__doc__, runs=30)
    parser.add_argument("--no-libvirt", action="store_true", help="measure without libvirt")
    options = parser.parse_args()
    turns = measure(options.runs, has_libvirt=not options.no_libvirt)
    report = Report("Hot add of a disk")
    report.add(turns.answer, turns.work, turns.guest, turns.removal)
    report.claim("to the answer, median", turns.answer.median, limit=ANSWER_LIMIT_MS, unit="ms")
    report.claim("to the guest's block device, median", turns.guest.median, limit=GUEST_LIMIT_MS, unit="ms")
    bars = [turns.answer, turns.guest]
    if turns.libvirt_guest.values:
        report.add(turns.libvirt_answer, turns.libvirt_guest)
        report.ratio(turns.answer, turns.libvirt_answer)
        report.ratio(turns.guest, turns.libvirt_guest)
        bars += [turns.libvirt_answer, turns.libvirt_guest]
    else:
        report.note(f"libvirt: not measured; {missing() or 'it was not wanted'}")
    report.bars("hotplug", "Hot add of a disk, median", *bars)
    report.publish(options.json)


if __name__ == "__main__":
    main()
