"""For how long a guest stands still when it moves to another server on this host, beside QEMU alone.

Guests write to their memory all the time and a character to their serial port every few milliseconds. Each
turn moves one from QEMU to QEMU by hand and one, with the same command line, from server to server, with the
same limit; then both with memory that is handed over, and one of 4 GiB so. A guest rests while another moves.
After SECONDS no other turn is begun.
By hand it stands still from the STOP that the one QEMU tells to the RESUME of the other; for ours it is what
the destination's `vm.migration-progress` says. The silence of the serial port is longer: an emulated guest's
code is translated anew.

    python benches/migration.py [--runs N] [--downtime-ms MS] [--seconds SECONDS] [--json FILE]
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

import by_hand
from bed import POLL_EVERY_S, running_server
from cloudvmm.guest.shell import GuestShell
from guest import bench_config, engine_flags
from harness import Report, Series, bench_parser
from support.process import descendants_of
from support.vmm import Vmm

MIB: Final = 1024 * 1024
SMALL_BYTES, LARGE_BYTES = 256 * MIB, 4096 * MIB
READY_S = 120.0
MOVE_S = 60.0
ANY_FOLDER = "/the-folder"  # stands for one of its own for each QEMU
TICKS = 50  # that a guest gives before it is moved again
LIMIT = 1.2
LOCAL_LIMIT_MS = 50.0
# Some memory that was written once, some that is written all the time, and the ticks.
WORK = """
head -c 64m /dev/urandom >/tmp/filled
(while :; do dd if=/dev/urandom of=/tmp/busy bs=64k count=16; usleep 20000; done) >/dev/null 2>&1 &
(while :; do echo -n .; usleep 2000; done) >/dev/ttyS0 2>/dev/null &
"""


class Silence(threading.Thread):
    """Watches the file `path` and keeps the longest time in which it did not grow."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self._path = path
        self._end = threading.Event()
        self.longest_s = 0.0

    def run(self) -> None:
        before, last_s = size_of(self._path), time.monotonic()
        while not self._end.wait(POLL_EVERY_S):
            now, now_s = size_of(self._path), time.monotonic()
            if now != before:
                self.longest_s = max(self.longest_s, now_s - last_s)
                before, last_s = now, now_s

    def finish(self) -> float:
        """Return the milliseconds."""
        self._end.set()
        self.join()
        return self.longest_s * 1000


def size_of(path: str) -> int:
    return os.stat(path).st_size


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + MOVE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("What was waited for did not happen")
        time.sleep(POLL_EVERY_S)


class OurGuest:
    """A guest at a server; what was started ends with `undo`."""

    name = "server to server"

    def __init__(self, undo: contextlib.ExitStack, ram_bytes: int, downtime_ms: int) -> None:
        self._undo = undo
        self._downtime_ms = downtime_ms
        self._folder = undo.enter_context(tempfile.TemporaryDirectory())
        self.serial = f"{self._folder}/serial"
        pid, self._vmm = self._serve()
        config = bench_config("qemu", self._folder)
        config |= {"memory": {"size": ram_bytes, "shared": True}, "console": {"mode": "Pty"}}
        self._vmm.put("vm.create", config)
        self._vmm.put("vm.boot")
        with shell_at(self._vmm.get("vm.info")["config"]["console"]["file"]) as shell:
            set_to_work(shell)
        (self.qemu_pid,) = (child.pid for child in descendants_of(pid) if "qemu-system" in child.command)

    def rest(self) -> None:
        self._vmm.put("vm.pause")

    def go_on(self) -> None:
        self._vmm.put("vm.resume")

    def move(self, *, is_local: bool) -> float:
        """Return for how many milliseconds it stood still."""
        (_, target), source = self._serve(), self._vmm
        url = f"unix:{self._folder}/way"
        receiver = threading.Thread(target=target.put, args=("vm.receive-migration", {"receiver_url": url}))
        receiver.start()
        wait_for(lambda: os.path.exists(url.removeprefix("unix:")))
        source.put(
            "vm.send-migration", {"destination_url": url, "local": is_local, "downtime_ms": self._downtime_ms}
        )
        receiver.join()
        self._vmm = target
        downtime_ms: float = target.get("vm.migration-progress")["downtime_ms"]
        return downtime_ms

    def _serve(self) -> tuple[int, Vmm]:
        folder = self._undo.enter_context(tempfile.TemporaryDirectory())
        process, vmm = self._undo.enter_context(running_server(folder, engine_flags("qemu")))
        return process.pid, vmm


class HandGuest:
    """The guest of another QEMU, `like_pid`, started by hand, with memory in files."""

    name = "QEMU to QEMU by hand"

    def __init__(self, undo: contextlib.ExitStack, like_pid: int, serial: str, downtime_ms: int) -> None:
        self._undo = undo
        self._downtime_ms = downtime_ms
        folder = undo.enter_context(tempfile.TemporaryDirectory())
        self.serial = f"{folder}/serial"
        self._command = by_hand.command_of(like_pid, ANY_FOLDER, renamed={serial: self.serial})
        self._memories = undo.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        self._ram = f"{self._memories}/0"
        self._folder, self._monitor, self._end = self._start()
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(f"{self._folder}/chr.d__console")
            set_to_work(GuestShell(console))

    def rest(self) -> None:
        self._monitor.execute("stop")

    def go_on(self) -> None:
        self._monitor.execute("cont")

    def move(self, *, is_local: bool) -> float:
        """Return for how many milliseconds it stood still."""
        source, end_source, ram = self._monitor, self._end, self._ram
        if not is_local:
            self._ram = f"{self._memories}/{int(os.path.basename(ram)) + 1}"
        self._folder, target, self._end = self._start("-incoming", "defer")
        apart = {"capability": "x-ignore-shared", "state": is_local}
        limits = {"max-bandwidth": 10 << 30, "downtime-limit": self._downtime_ms}
        uri = {"uri": f"unix:{self._folder}/way"}
        for side in (source, target):
            side.execute("migrate-set-capabilities", {"capabilities": [apart]})
        target.execute("migrate-incoming", uri)
        source.execute("migrate-set-parameters", limits)
        source.execute("migrate", uri)
        resumed_s = target.event_s("RESUME")
        source.execute("query-status")  # it has told all that came before
        stopped_s = source.event_s("STOP")
        end_source()
        if not is_local:
            os.unlink(ram)
        self._monitor = target
        return (resumed_s - stopped_s) * 1000

    def _start(self, *words: str) -> tuple[str, by_hand.Monitor, Callable[[], None]]:
        undo = self._undo.enter_context(contextlib.ExitStack())
        folder = undo.enter_context(tempfile.TemporaryDirectory())
        argv = [self._in_file(word.replace(ANY_FOLDER, folder)) for word in self._command.argv]
        command = by_hand.HandCommand([*argv, *words], self._command.monitor_path.replace(ANY_FOLDER, folder))
        process = by_hand.start(command.argv)
        undo.callback(by_hand.end, process)
        monitor = by_hand.Monitor(command, process)
        undo.callback(monitor.close)
        return folder, monitor, undo.close

    def _in_file(self, word: str) -> str:
        """Return `word` with memory that another QEMU can have, too."""
        if not word.startswith('{"qom-type":"memory-backend-memfd"'):
            return word
        ram = msgspec.json.decode(word) | {"qom-type": "memory-backend-file", "mem-path": self._ram}
        return msgspec.json.encode(ram).decode()


@contextlib.contextmanager
def shell_at(path: str) -> Iterator[GuestShell]:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield GuestShell(fd)
    finally:
        os.close(fd)


def set_to_work(shell: GuestShell) -> None:
    shell.wait_ready(READY_S)
    shell.run(WORK, timeout_s=MOVE_S)


class Row:
    """A guest that rests, and what its moves of one kind cost."""

    def __init__(self, guest: OurGuest | HandGuest, what: str, *, is_local: bool) -> None:
        self.stood = Series(f"{what}, {guest.name}", "ms")
        self.silent = Series(f"{what}, {guest.name}: silence", "ms")
        self._guest = guest
        self._is_local = is_local

    def move(self) -> None:
        self._guest.go_on()
        self._wait_ticks()
        silence = Silence(self._guest.serial)
        silence.start()
        self.stood.add(self._guest.move(is_local=self._is_local))
        self._wait_ticks()
        self.silent.add(silence.finish())
        self._guest.rest()

    def _wait_ticks(self) -> None:
        before = size_of(self._guest.serial)
        wait_for(lambda: size_of(self._guest.serial) > before + TICKS)


def main() -> None:
    parser = bench_parser(__doc__, runs=9)
    parser.add_argument(
        "--downtime-ms", type=int, default=300, help="the limit that is asked for (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=180.0, help="(%(default)s)")
    options = parser.parse_args()
    limit_ms: int = options.downtime_ms
    with contextlib.ExitStack() as undo:
        guest = OurGuest(undo, SMALL_BYTES, limit_ms)
        hand = HandGuest(undo, guest.qemu_pid, guest.serial, limit_ms)
        large_guest = OurGuest(undo, LARGE_BYTES, limit_ms)
        for one in (guest, hand, large_guest):
            one.rest()
        copied_by_hand = Row(hand, "copied, 256 MiB", is_local=False)
        copied = Row(guest, "copied, 256 MiB", is_local=False)
        shared_by_hand = Row(hand, "handed over, 256 MiB", is_local=True)
        shared = Row(guest, "handed over, 256 MiB", is_local=True)
        large = Row(large_guest, "handed over, 4 GiB", is_local=True)
        rows = (copied_by_hand, copied, shared_by_hand, shared, large)
        deadline_s = time.monotonic() + options.seconds
        for _ in range(options.runs):
            for row in rows:
                row.move()
            if time.monotonic() > deadline_s:
                break
    report = Report(f"For how long a guest stands still that moves, with downtime_ms {limit_ms}")
    report.add(*itertools.chain.from_iterable((row.stood, row.silent) for row in rows))
    report.claim(
        "copied, against QEMU alone",
        copied.stood.median / copied_by_hand.stood.median,
        limit=LIMIT,
        unit="x",
    )
    report.claim("copied, the longest of all", max(copied.stood.values), limit=limit_ms, unit="ms")
    report.claim("handed over, 256 MiB, median", shared.stood.median, limit=LOCAL_LIMIT_MS, unit="ms")
    report.claim("handed over, 4 GiB, median", large.stood.median, limit=LOCAL_LIMIT_MS, unit="ms")
    report.claim(
        "handed over, 4 GiB against 256 MiB", large.stood.median / shared.stood.median, limit=LIMIT, unit="x"
    )
    report.publish(options.json)


if __name__ == "__main__":
    main()
