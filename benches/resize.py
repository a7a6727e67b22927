"""How long a resize takes until the guest sees it: the server beside the same QEMU driven by raw QMP.

Two guests run, one of the server and one of a QEMU by hand (`by_hand.py`), and take turns. Each gets a vCPU,
then 128 MiB of RAM by virtio-mem. The guest looks for either every few milliseconds, from before it is asked
for, and writes a word to its serial port when it is there: QEMU writes that to a file, for both alike.

    python benches/resize.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import by_hand
from bed import running_server
from boot import qemu_of
from cloudvmm.guest.shell import GuestShell
from guest import RAM_BYTES, bench_config, engine_flags
from harness import Report, Series, bench_parser, paired_ratio, ratio
from hotplug import READY_TIMEOUT_S, TIMEOUT_S, Waiter, booted_guest
from support.vmm import Vmm

RATIO_LIMIT = 1.1
MIB = 1 << 20
BLOCK_MIB = 128
WATCH_EVERY_S = 0.0003
OURS, THEIRS = "serial.ours", "serial.theirs"
LOOKING, SEEN = b"looking", b"seen"
# Without programs of their own: to start one takes an emulated guest longer than what is measured.
HAS_VCPU = "test -e /sys/devices/system/cpu/cpu{number}"
TOTAL = "read name kib unit </proc/meminfo"
HAS_MEMORY = TOTAL + " && test $kib -ge {kib}"
LOOK = "echo looking >/dev/ttyS0; until {condition}; do usleep 3000; done; echo seen >/dev/ttyS0"


class Turns:
    """The series of the turns taken so far, of the server and by hand."""

    def __init__(self) -> None:
        self.answer = Series("vm.resize of vCPUs to the answer, server", "ms")
        self.vcpu = Series("vm.resize to the guest's vCPU, server", "ms")
        self.vcpu_by_hand = Series("device_add to the guest's vCPU, by hand", "ms")
        self.memory = Series("vm.resize to the guest's memory, server", "ms")
        self.memory_by_hand = Series("qom-set to the guest's memory, by hand", "ms")


class Side:
    """One of the two guests, and how it is asked."""

    def __init__(
        self,
        shell: GuestShell,
        serial: Path,
        add_vcpu: Callable[[int], object],
        set_plugged: Callable[[int], object],
    ) -> None:
        self._shell = shell
        self._serial = serial
        self._add_vcpu = add_vcpu
        self._set_plugged = set_plugged
        status, output = shell.run(f"{TOTAL}; echo $kib", timeout_s=TIMEOUT_S)
        if status != 0:
            raise SystemExit("The guest does not tell its memory")
        self._boot_kib = int(output)

    def add_vcpu(self, number: int) -> tuple[float, float]:
        """Return the milliseconds to the answer, and until the guest sees vCPU `number`."""
        return self._timed(HAS_VCPU.format(number=number), lambda: self._add_vcpu(number))

    def add_memory(self, blocks: int) -> float:
        """Return the milliseconds until the guest has all of so many `blocks`."""
        plugged = blocks * BLOCK_MIB
        condition = HAS_MEMORY.format(kib=self._boot_kib + plugged * 1024)
        return self._timed(condition, lambda: self._set_plugged(plugged * MIB))[1]

    def _timed(self, condition: str, call: Callable[[], object]) -> tuple[float, float]:
        """Do `call` while the guest looks for `condition`; return the milliseconds to the end of each."""
        said = self._serial.stat().st_size
        waiter = Waiter(self._shell, LOOK.format(condition=condition))
        waiter.start()
        self._wait_word(LOOKING, said)
        started_s = time.monotonic()
        call()
        answered_s = time.monotonic()
        self._wait_word(SEEN, said)
        seen_s = time.monotonic()
        waiter.join()
        return (answered_s - started_s) * 1000, (seen_s - started_s) * 1000

    def _wait_word(self, word: bytes, after: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        with self._serial.open("rb") as file:
            while word not in os.pread(file.fileno(), 4096, after):
                if time.monotonic() > deadline:
                    raise SystemExit("The guest did not see what was waited for")
                time.sleep(WATCH_EVERY_S)


def config(folder: str, runs: int) -> dict[str, Any]:
    memory = {
        "size": RAM_BYTES,
        "hotplug_method": "VirtioMem",
        "hotplug_size": (runs + 1) * BLOCK_MIB * MIB,
    }
    changed = bench_config("qemu", folder) | {"memory": memory}
    changed["cpus"] = {"boot_vcpus": 1, "max_vcpus": runs + 2}
    changed["payload"]["cmdline"] += " memhp_default_state=online_movable"
    return changed


def server_side(vmm: Vmm, shell: GuestShell, serial: Path) -> Side:
    return Side(
        shell,
        serial,
        lambda number: vmm.put("vm.resize", {"desired_vcpus": number + 1}),
        lambda plugged: vmm.put("vm.resize", {"desired_ram": RAM_BYTES + plugged}),
    )


@contextlib.contextmanager
def side_by_hand(command: by_hand.HandCommand, folder: str, serial: Path) -> Iterator[Side]:
    process = by_hand.start(command.argv)
    try:
        monitor = by_hand.Monitor(command, process)
        console = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(monitor), console:
            console.connect(_console_path(command, folder))
            shell = GuestShell(console)
            shell.wait_ready(READY_TIMEOUT_S)
            free = [place for place in monitor.execute("query-hotpluggable-cpus") if "qom-path" not in place]
            places = sorted(free, key=lambda place: sorted(place["props"].items()))
            [zone] = monitor.execute("query-memory-devices")
            path = f"/machine/peripheral/{zone['data']['id']}"

            def add_vcpu(number: int) -> None:
                place = places[number - 1]
                vcpu = {"driver": place["type"], "id": f"vcpu{number}", **place["props"]}
                monitor.execute("device_add", vcpu)

            def set_plugged(plugged: int) -> None:
                monitor.execute("qom-set", {"path": path, "property": "requested-size", "value": plugged})

            yield Side(shell, serial, add_vcpu, set_plugged)
    finally:
        by_hand.end(process)


def _console_path(command: by_hand.HandCommand, folder: str) -> str:
    [name] = {
        value.split(",")[1].removeprefix("id=")
        for value in command.argv
        if value.startswith("socket,") and "console" in value.split(",")[1]
    }
    return str(Path(folder, name))


def measure(runs: int) -> Turns:
    turns = Turns()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(folder, engine_flags("qemu")) as (server, vmm),
        booted_guest(vmm, folder, config(folder, runs), serial=os.path.join(folder, OURS)) as shell,
    ):
        renamed = {os.path.join(folder, OURS): os.path.join(folder, THEIRS)}
        command = by_hand.command_of(qemu_of(server.pid), folder, renamed=renamed)
        with side_by_hand(command, folder, Path(folder, THEIRS)) as theirs:
            ours = server_side(vmm, shell, Path(folder, OURS))
            take_turn(ours, theirs, 1, Turns())  # not counted: what is rare is imported now
            for number in range(2, runs + 2):
                take_turn(ours, theirs, number, turns)
                time.sleep(0.05)  # both guests come to rest
    return turns


def take_turn(ours: Side, theirs: Side, number: int, turns: Turns) -> None:
    """Whoever goes second goes first in the next turn."""

    def server() -> None:
        answer_ms, guest_ms = ours.add_vcpu(number)
        turns.answer.add(answer_ms)
        turns.vcpu.add(guest_ms)
        turns.memory.add(ours.add_memory(number))

    def hand() -> None:
        turns.vcpu_by_hand.add(theirs.add_vcpu(number)[1])
        turns.memory_by_hand.add(theirs.add_memory(number))

    for take in (server, hand) if number % 2 else (hand, server):
        take()


def main() -> None:
    options = bench_parser(__doc__, runs=15).parse_args()
    turns = measure(options.runs)
    report = Report("Resizes until the guest sees them")
    report.add(turns.answer, turns.vcpu, turns.vcpu_by_hand, turns.memory, turns.memory_by_hand)
    for name, ours, theirs in (
        ("vCPU", turns.vcpu, turns.vcpu_by_hand),
        ("memory", turns.memory, turns.memory_by_hand),
    ):
        report.claim(f"server / by hand, {name}, medians", ratio(ours, theirs), limit=RATIO_LIMIT, unit="x")
        report.note(f"median of the pairs' ratios, {name}: {paired_ratio(ours, theirs):.3f}")
    report.publish(options.json)


if __name__ == "__main__":
    main()
