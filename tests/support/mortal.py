"""`cloudvmm` as a program that dies, as by kill -9, at a chosen step of what it does.

Run as `python -m support.mortal FOLDER TRAFFIC FLAG...`; the rest is `tapped.py`. A step is a moment at which
something that outlives the process changes, or is about to: a file, a socket, another process, and what QEMU
is told, before and behind that. The tests write into FOLDER at which step, from then on, it is to die, and
read there which steps there were.
"""

from __future__ import annotations

import mmap
import os
import runpy
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import Any, Final

from cloudvmm.engine.qemu.qmp import QmpClient

# What Python itself tells of, before it is done.
_TOLD: Final = frozenset(
    {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.posix_spawn", "socket.bind"}
)
# What changes nothing, and goes on beside commands: how often is chance.
_LOOKS: Final = ("query-", "x-query-", "qom-get", "qom-list")
_LAYOUT: Final = struct.Struct("QQ")
_WRITES: Final = os.O_WRONLY | os.O_RDWR


class Plan:
    """What the tests and the program have in common, in a file: at which step it dies, counted from when.

    The threads that start other programs may open no file, so it is mapped.
    """

    def __init__(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.truncate(_LAYOUT.size)
            self._memory = mmap.mmap(file.fileno(), _LAYOUT.size)

    def read(self) -> tuple[int, int]:
        """Return the number of the plan, and the step at which to die; 0 is none."""
        number, step = _LAYOUT.unpack(self._memory[:])
        return number, step

    def write(self, step: int) -> None:
        """Have the steps be counted anew, up to `step`."""
        number, _ = self.read()
        self._memory[:] = _LAYOUT.pack(number + 1, step)


class Mortal:
    """Counts the steps of all threads. `traffic` is the tests' own, and no step."""

    def __init__(self, folder: Path, traffic: str) -> None:
        self._plan = Plan(folder / "plan")
        self._names = os.open(folder / "steps", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._ours = (traffic, "/proc/", "/dev/null")
        self._lock = threading.Lock()
        self._number = self._count = 0
        self._is_over = threading.Event()
        threading.Thread(target=self._die, name="mortal", daemon=True).start()

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take an event of `sys.addaudithook`."""
        if event in _TOLD or (event == "open" and _is_for_writing(arguments)):
            path = str(arguments[0]) if arguments else ""
            if not path.startswith(self._ours):
                self.step(f"{event} {path}")

    def step(self, name: str) -> None:
        with self._lock:
            number, last = self._plan.read()
            if number != self._number:
                self._number, self._count = number, 0
            self._count += 1
            os.write(self._names, f"{number} {name}\n".encode())
            if self._count == last:
                self._is_over.set()
                threading.Event().wait()

    def _die(self) -> None:
        """Kill the process when it is over: a thread that starts another program may send us no signal."""
        self._is_over.wait()
        os.kill(os.getpid(), signal.SIGKILL)


def _is_for_writing(arguments: tuple[Any, ...]) -> bool:
    path, _, flags = arguments
    return isinstance(path, str) and bool(flags & _WRITES)


def _mark_commands(mortal: Mortal) -> None:
    send = QmpClient._send

    def marked(self: QmpClient, command: str, *arguments: Any) -> None:
        if command.startswith(_LOOKS):
            send(self, command, *arguments)
            return
        mortal.step(f"before {command}")
        send(self, command, *arguments)
        mortal.step(f"behind {command}")

    QmpClient._send = marked  # type: ignore[method-assign]


if __name__ == "__main__":
    found = Mortal(Path(sys.argv.pop(1)), sys.argv[1])
    _mark_commands(found)
    sys.addaudithook(found.hear)
    runpy.run_module("support.tapped", run_name="__main__", alter_sys=True)
