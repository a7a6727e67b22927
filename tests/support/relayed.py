"""`cloudvmm` as a program with a relay between it and each monitor of its QEMU, which strikes when told.

Run as `python -m support.relayed FOLDER TRAFFIC FLAG...`; the rest is `tapped.py`. The tests write into
FOLDER what is to happen (`Plan`), and read there which commands went by. Nothing else tells the two apart
from a `cloudvmm` alone: QEMU has its end of a socket pair, and so has the monitor's client.
"""

from __future__ import annotations

import array
import contextlib
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cloudvmm.engine.qemu import launch
from support.leak import children_of

MOST_FDS = 253
CHUNK_BYTES = 1 << 16
FIND_S = 20.0
LATE_S = 0.4
HELD_EVENTS = 3
HELD_MS = 200  # where no answer comes behind them


class Plan(msgspec.Struct, frozen=True):
    """At the command that is the `step`th from now on, from 1, on all monitors together: `fault`.

    0 is none: the commands are counted alone. Another `number` is another plan.
    """

    number: int
    step: int = 0
    fault: str = ""


class Watcher:
    """What all relays of the process have in common: the plan, and where in it we are. Any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._plan = Plan(0)
        self._count = 0

    def command(self, name: str) -> str:
        """Take note of a command that is about to reach QEMU; return the fault that strikes it, if any."""
        with self._lock:
            plan = self._read()
            if plan.number != self._plan.number:
                self._plan, self._count = plan, 0
            self._count += 1
            with open(self._folder / f"steps{plan.number}", "a") as file:
                file.write(f"{name}\n")
            return plan.fault if self._count == plan.step else ""

    def _read(self) -> Plan:
        try:
            return msgspec.json.decode((self._folder / "plan").read_bytes(), type=Plan)
        except FileNotFoundError:
            return self._plan


class Relay:
    """Between `near`, the client's peer, and `far`, QEMU's. Owns both, and ends with either."""

    def __init__(self, near: socket.socket, far: socket.socket, watcher: Watcher) -> None:
        self._near, self._far, self._watcher = near, far, watcher
        self._asked: dict[Any, str] = {}  # the fault for the answer to the command with this id
        self._events_fault = ""
        self._held: list[bytes] = []
        threading.Thread(target=self._run, name="relay", daemon=True).start()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._near, select.POLLIN)
        poller.register(self._far, select.POLLIN)
        left = {self._near: b"", self._far: b""}
        with self._near, self._far, contextlib.suppress(OSError):
            while True:
                ready = poller.poll(HELD_MS if self._held else None)
                if not ready:
                    self._let_go()
                for fd, _ in ready:
                    end = self._near if fd == self._near.fileno() else self._far
                    data, fds = _receive(end)
                    if not data:
                        return
                    *lines, left[end] = (left[end] + data).split(b"\n")
                    with _closing(fds):
                        if end is self._near:
                            for line in lines:
                                self._hear(line)
                            self._far.sendall(data[_send_fds(self._far, data, fds) :])
                        else:
                            self._pass_on([line + b"\n" for line in lines])

    def _hear(self, line: bytes) -> None:
        message = msgspec.json.decode(line)
        name = message.get("execute") or message.get("exec-oob")
        fault = self._watcher.command(name)
        if fault in ("kill", "halt", "freeze"):
            _signal_qemu(fault)
        elif fault == "cut":
            raise ConnectionResetError
        elif fault in ("hold events", "repeat events", "empty events"):
            self._events_fault = fault
        elif fault:
            self._asked[message.get("id")] = fault

    def _pass_on(self, lines: list[bytes]) -> None:
        for line in lines:
            message = msgspec.json.decode(line)
            if "event" in message:
                out = self._changed_event(message, line)
            else:
                out = self._changed_answer(message, line)
            if out:
                self._near.sendall(out)
            if "event" not in message:
                self._let_go()

    def _let_go(self) -> None:
        held, self._held = self._held, []
        self._near.sendall(b"".join(held))

    def _changed_answer(self, message: dict[str, Any], line: bytes) -> bytes:
        fault = self._asked.pop(message.get("id"), "") if "QMP" not in message else ""
        number = message.get("id")
        match fault:
            case "late":
                time.sleep(LATE_S)
            case "drop":
                return b""
            case "garbage":
                return b'{"return": {\xff]\r\n'
            case "half":
                self._near.sendall(line[: len(line) // 2])
                raise ConnectionResetError
            case "other value":
                return msgspec.json.encode({"return": [17, None], "id": number}) + b"\n"
            case "other id":
                return msgspec.json.encode({"return": {}, "id": 10**9}) + line
            case "refuse":
                refusal = {"class": "GenericError", "desc": "A fault of the test"}
                return msgspec.json.encode({"error": refusal, "id": number}) + b"\n"
        return line

    def _changed_event(self, message: dict[str, Any], line: bytes) -> bytes:
        match self._events_fault:
            case "hold events" if len(self._held) < HELD_EVENTS:
                self._held.insert(0, line)  # behind the next answer, and in the other order
                return b""
            case "repeat events":
                return line * 2
            case "empty events":
                return msgspec.json.encode({**message, "data": {}}) + b"\n"
        return line


class _Sockets:
    """The module `socket` for whoever starts QEMU, with a relay in each pair."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def socketpair(self) -> tuple[socket.socket, socket.socket]:
        with contextlib.ExitStack() as undo:
            client, near = map(undo.enter_context, socket.socketpair())
            far, qemu = map(undo.enter_context, socket.socketpair())
            Relay(near, far, self._watcher)
            undo.pop_all()
        return client, qemu


def _receive(end: socket.socket) -> tuple[bytes, list[int]]:
    data, ancillary, _, _ = end.recvmsg(CHUNK_BYTES, socket.CMSG_SPACE(MOST_FDS * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _, _, content in ancillary:
        fds.frombytes(content[: len(content) - len(content) % 4])
    return data, list(fds)


def _send_fds(end: socket.socket, data: bytes, fds: list[int]) -> int:
    return socket.send_fds(end, [data], fds) if fds else 0


@contextlib.contextmanager
def _closing(fds: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def _signal_qemu(fault: str) -> None:
    pid = _qemu()
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        if fault == "halt":
            time.sleep(LATE_S)
            os.kill(pid, signal.SIGCONT)


def _qemu() -> int | None:
    """Return the pid of the QEMU with a guest, as soon as there is one: its monitors are there before it."""
    deadline = time.monotonic() + FIND_S
    while time.monotonic() < deadline:
        for pid in children_of(os.getpid()):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"-nodefaults" in words and b"-S" in words:
                    return pid
        time.sleep(0.005)
    return None


if __name__ == "__main__":
    launch.socket = _Sockets(Watcher(Path(sys.argv.pop(1))))  # type: ignore[assignment]
    runpy.run_module("support.tapped", run_name="__main__", alter_sys=True)
