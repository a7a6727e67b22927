"""How long a guest stands still when it moves to another server on this host, memory copied or handed over.

The guest writes a character to its serial port every few milliseconds; what counts is the longest silence in
the files of both sides. The same guest, with the same work, is moved between two QEMUs by hand beside it,
either way. An emulated guest is silent longer than it stands still: the other QEMU translates its code
anew, and starts beside it. So the time that the destination tells is taken too: from its stop until it runs.

    python benches/migration.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bed import POLL_EVERY_S, running_server
from cloudvmm.guest.shell import GuestShell
from guest import bench_config, engine_flags
from harness import Report, Series, bench_parser

MIB = 1024 * 1024
SMALL_BYTES, LARGE_BYTES = 256 * MIB, 4096 * MIB
READY_TIMEOUT_S = 120.0
MOVE_S = 120.0
LIMIT = 1.2
LOCAL_LIMIT_MS = 50.0
# Some memory that was written once, some that is written all the time, and the ticks.
WORK = """
head -c 64m /dev/urandom >/tmp/filled
(while :; do dd if=/dev/urandom of=/tmp/busy bs=64k count=16; usleep 20000; done) >/dev/null 2>&1 &
(while :; do echo -n .; usleep 2000; done) >/dev/ttyS0 2>/dev/null &
"""


class Silence(threading.Thread):
    """Watches the files `paths` and keeps the longest time in which none of them grew."""

    def __init__(self, *paths: str) -> None:
        super().__init__(daemon=True)
        self._paths = paths
        self._end = threading.Event()
        self.longest_s = 0.0

    def run(self) -> None:
        before, last_s = self._sizes(), time.monotonic()
        while not self._end.wait(POLL_EVERY_S):
            now, now_s = self._sizes(), time.monotonic()
            if now != before:
                self.longest_s = max(self.longest_s, now_s - last_s)
                before, last_s = now, now_s

    def finish(self) -> float:
        """Return the milliseconds."""
        self._end.set()
        self.join()
        return self.longest_s * 1000

    def _sizes(self) -> list[int]:
        return [os.stat(path).st_size if os.path.exists(path) else 0 for path in self._paths]


def silence_of(move: Callable[[], object], *paths: str) -> float:
    """Return for how many milliseconds the guest is silent at most while it is moved, and right after."""
    watcher = Silence(*paths)
    watcher.start()
    move()
    sizes = [os.stat(path).st_size for path in paths if os.path.exists(path)]
    wait_for(lambda: sizes != [os.stat(path).st_size for path in paths if os.path.exists(path)])
    return watcher.finish()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + MOVE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("What was waited for did not happen")
        time.sleep(POLL_EVERY_S)


def ours(ram_bytes: int, **options: Any) -> tuple[float, float]:
    """Return the milliseconds of the longest silence, and those that the destination tells."""
    with contextlib.ExitStack() as undo:
        folders = [undo.enter_context(tempfile.TemporaryDirectory()) for _ in range(2)]
        (_, source), (_, target) = (
            undo.enter_context(running_server(folder, engine_flags("qemu"))) for folder in folders
        )
        serial, url = f"{folders[0]}/serial", f"unix:{folders[1]}/way"
        config = bench_config("qemu", folders[0])
        config |= {"memory": {"size": ram_bytes, "shared": True}, "console": {"mode": "Pty"}}
        source.put("vm.create", config)
        with shell_at(source.get("vm.info")["config"]["console"]["file"]) as shell:
            source.put("vm.boot")
            shell.wait_ready(READY_TIMEOUT_S)
            shell.run(WORK, timeout_s=MOVE_S)

            def move() -> None:
                body = {"receiver_url": url}
                receiver = threading.Thread(target=target.put, args=("vm.receive-migration", body))
                receiver.start()
                wait_for(lambda: os.path.exists(url.removeprefix("unix:")))
                source.put("vm.send-migration", {"destination_url": url, **options})
                receiver.join()

            silence_ms = silence_of(move, serial)
            return silence_ms, target.get("vm.migration-progress")["downtime_ms"]


@contextlib.contextmanager
def shell_at(path: str) -> Iterator[GuestShell]:
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield GuestShell(fd)
    finally:
        os.close(fd)


class Qemu:
    """A QEMU that is started by hand, and its monitor."""

    def __init__(self, folder: str, ram_bytes: int, ram_fd: int, *words: str) -> None:
        payload = bench_config("qemu", folder)["payload"]
        self.console, self.serial, monitor = (f"{folder}/{name}" for name in ("console", "serial", "monitor"))
        memory = f"memory-backend-file,id=ram0,size={ram_bytes},share=on,mem-path=/proc/self/fd/{ram_fd}"
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-M", "q35,memory-backend=ram0", "-accel", "tcg", "-cpu", "max"),
                *("-nodefaults", "-display", "none", "-m", str(ram_bytes // MIB), "-object", memory),
                *("-kernel", payload["kernel"], "-initrd", payload["initramfs"]),
                *("-append", payload["cmdline"], "-serial", f"file:{self.serial}"),
                *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console"),
                *("-chardev", f"socket,id=console,path={self.console},server=on,wait=off"),
                *("-qmp", f"unix:{monitor},server=on,wait=off", *words),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=[ram_fd],
        )
        wait_for(lambda: os.path.exists(monitor))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(monitor)
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "event" in (answer := json.loads(self._lines.readline())):
            pass
        return answer["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        self.process.kill()
        self.process.wait()


def by_hand(ram_bytes: int, *, local: bool = False) -> float:
    with contextlib.ExitStack() as undo:
        folders = [undo.enter_context(tempfile.TemporaryDirectory()) for _ in range(2)]
        ram_fds = [open_ram(ram_bytes, undo) for _ in range(1 if local else 2)]
        source = Qemu(folders[0], ram_bytes, ram_fds[0])
        undo.callback(source.close)
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(source.console)
            shell = GuestShell(console)
            shell.wait_ready(READY_TIMEOUT_S)
            shell.run(WORK, timeout_s=MOVE_S)

            def move() -> None:
                uri = f"unix:{folders[1]}/way"
                target = Qemu(folders[1], ram_bytes, ram_fds[-1], "-incoming", "defer")
                undo.callback(target.close)
                for side in (source, target):
                    apart = {"capability": "x-ignore-shared", "state": local}
                    side.execute("migrate-set-capabilities", capabilities=[apart])
                target.execute("migrate-incoming", uri=uri)
                source.execute("migrate-set-parameters", **{"max-bandwidth": 10 << 30})
                source.execute("migrate", uri=uri)
                wait_for(lambda: source.execute("query-migrate")["status"] == "completed")

            return silence_of(move, source.serial, f"{folders[1]}/serial")


def open_ram(size_bytes: int, undo: contextlib.ExitStack) -> int:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    undo.callback(os.close, fd)
    os.ftruncate(fd, size_bytes)
    return fd


def main() -> None:
    options = bench_parser(__doc__, runs=5).parse_args()
    copied, bare = Series("memory copied", "ms"), Series("the same by two QEMUs alone", "ms")
    bare_handed = Series("memory shared by two QEMUs alone, 256 MiB", "ms")
    handed = {
        SMALL_BYTES: (Series("memory handed over, 256 MiB", "ms"), Series("of that it stood still", "ms")),
        LARGE_BYTES: (
            Series("memory handed over, 4 GiB", "ms"),
            Series("of that it stood still, 4 GiB", "ms"),
        ),
    }
    for _ in range(options.runs):
        bare.add(by_hand(SMALL_BYTES))
        copied.add(ours(SMALL_BYTES)[0])
        bare_handed.add(by_hand(SMALL_BYTES, local=True))
        for ram_bytes, (silent, stood) in handed.items():
            silent_ms, stood_ms = ours(ram_bytes, local=True)
            silent.add(silent_ms)
            stood.add(stood_ms)
    (silent, stood), (_, stood_large) = handed.values()
    report = Report("The longest silence of a guest that moves")
    report.add(bare, copied, bare_handed, *(series for pair in handed.values() for series in pair))
    report.claim("copied, against QEMU alone", copied.median / bare.median, limit=LIMIT, unit="x")
    report.claim("handed over, against QEMU alone", silent.median / bare_handed.median, limit=LIMIT, unit="x")
    report.claim("stood still, 256 MiB, median", stood.median, limit=LOCAL_LIMIT_MS, unit="ms")
    report.claim("stood still, 4 GiB, median", stood_large.median, limit=LOCAL_LIMIT_MS, unit="ms")
    report.publish(options.json)


if __name__ == "__main__":
    main()
