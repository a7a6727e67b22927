"""For tests that attack a server: calls in the background, kill -9 in their middle, what a process holds."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from support.deadline import HOST_S
from support.process import ProcessId, descendants_of, identify, state_of
from support.rest import Reply, RestClient, request_bytes
from support.server import Server
from support.vm import EngineChoice
from support.wait import POLL_EVERY_S, wait_until
from support.watch import Ticker

MIB = 1024 * 1024
QEMU_NAME = "qemu-system-x86_64"
NOTICE_S = 4.0  # of a `Watch`; whoever notices nothing waits ten seconds, at least
_CLIENT = (
    "import socket,sys\n"
    "s=socket.socket(socket.AF_UNIX)\n"
    "s.connect(sys.argv[1])\n"
    "s.sendall(sys.stdin.buffer.read())\n"
    "print('sent',flush=True)\n"
    "s.recv(1)\n"
    "sys.stdin.close()\n"
    "s.recv(65536)\n"
)


class Call:
    """One request, sent and awaited by a thread of its own, over a connection of its own."""

    def __init__(self, path: str, method: str, command: str, data: Any = None) -> None:
        self.command = command
        self._response: Reply | None = None
        self._error: Exception | None = None
        self.sent = threading.Event()
        raw = request_bytes(method, f"/api/v1/{command}", data)
        self._thread = threading.Thread(target=self._run, args=(path, raw), name=f"call {command}")
        self._thread.start()
        assert self.sent.wait(HOST_S), f"{command} could not be sent"

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def outcome(self, *, timeout_s: float) -> Reply | None:
        """Return the answer, None where the connection ended without one; fail where neither comes."""
        self._thread.join(timeout_s)
        assert self.is_over, f"{self.command} has no answer and no end after {timeout_s:g} s"
        if isinstance(self._error, (EOFError, OSError)):
            return None
        assert self._error is None, self._error
        return self._response

    def _run(self, path: str, raw: bytes) -> None:
        try:
            with RestClient(path, timeout_s=2 * HOST_S) as client:
                client.send(raw)
                self.sent.set()
                self._response = client.reply()
        except Exception as error:
            self._error = error
        finally:
            self.sent.set()


@contextlib.contextmanager
def client_process(path: str, method: str, command: str, data: Any = None) -> Iterator[subprocess.Popen]:
    """A process that has sent a request and waits for the answer; killed, if it still lives, at the end."""
    raw = request_bytes(method, f"/api/v1/{command}", data)
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _CLIENT, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(raw)
        process.stdin.close()
        assert process.stdout.readline() == b"sent\n"
        try:
            yield process
        finally:
            process.kill()


def see_out(client: RestClient) -> None:
    """Say no more and read on until the server, done with all that was said, closes."""
    client.socket.shutdown(socket.SHUT_WR)
    while client.socket.recv(65536):
        pass


def qemu_of(server: Server) -> ProcessId:
    """Wait for the QEMU that runs the server's VM."""
    return wait_until(lambda: find_qemu(server), "QEMU runs", timeout_s=HOST_S)


def find_qemu(server: Server) -> ProcessId | None:
    for child in server.children():
        words = (identify(child.pid) or child).command.split()
        if words and words[0].endswith(QEMU_NAME) and "-nodefaults" in words:
            return child
    return None


def stop_process(who: ProcessId) -> None:
    """Let it stand still, so that a call that needs it stays under way."""
    os.kill(who.pid, signal.SIGSTOP)
    wait_until(lambda: state_of(who.pid) in ("T", "Z"), f"{who.pid} stands still", timeout_s=HOST_S)


def wait_gone(who: ProcessId, *, timeout_s: float = HOST_S) -> None:
    wait_until(lambda: not who.is_alive(), f"process {who.pid} ({who.command}) is gone", timeout_s=timeout_s)


def spend(seconds: float, *, unless: Callable[[], bool] = lambda: False) -> None:
    """Let a chosen time go by, or less where `unless` comes true: to strike at a seeded moment of a call.

    For as long as the host stands still no time goes by.
    """
    ticker = Ticker()
    while ticker.tick() < seconds and not unless():
        os.sched_yield()


def booted(server: Server, engine: EngineChoice, folder: Path, **changes: Any) -> None:
    """Create and boot a bare VM, whose guest nobody waits for."""
    server.vmm.put("vm.create", bare_config(engine, folder, **changes))
    server.vmm.put("vm.boot")


def bare_config(engine: EngineChoice, folder: Path, **changes: Any) -> dict[str, Any]:
    config = {
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 256 * MIB},
        "payload": engine.payload(folder),
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "Null"},
        "console": {"mode": "Off"},
    }
    return {**config, **changes}


def standing_config(engine: EngineChoice, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return that of a small VM, whose guest finds too little memory and stands still: it resets nothing."""
    config = bare_config(engine, folder, **{"memory": {"size": 64 * MIB}, **changes})
    config["payload"]["cmdline"] += " panic=0"
    return config


def read_events(path: Path) -> list[str]:
    """Return `source/event` of each event in an event monitor's file; fail where one is broken.

    What the guest's drivers did is left out: when they come depends on the guest.
    """
    documents = [part for part in path.read_bytes().split(b"\n\n") if part.strip()]
    decoded = [msgspec.json.decode(part) for part in documents]
    return [f"{event['source']}/{event['event']}" for event in decoded if event["source"] != "virtio-device"]


class Held:
    """What another process holds: descriptors by what they are, threads by number, children."""

    def __init__(self, pid: int) -> None:
        self.descriptors = _descriptors(pid)
        self.threads = sorted(_names(pid))
        self.children = descendants_of(pid)

    def more_than(self, before: Held) -> list[str]:
        return [
            *_surplus("fd", self.descriptors, before.descriptors),
            *_surplus("thread", self.threads, before.threads),
            *(f"process {child.pid} {child.command}" for child in self.children - before.children),
        ]


def assert_holds_no_more(pid: int, before: Held, *, timeout_s: float = HOST_S) -> None:
    deadline = time.monotonic() + timeout_s
    while more := Held(pid).more_than(before):
        if time.monotonic() > deadline:
            raise AssertionError(f"Left behind: {'; '.join(more)}")
        time.sleep(POLL_EVERY_S)


def _surplus(kind: str, now: Sequence[str], before: Sequence[str]) -> list[str]:
    rest = list(before)
    surplus = []
    for one in now:
        if one in rest:
            rest.remove(one)
        else:
            surplus.append(f"{kind} {one}")
    return surplus


def _descriptors(pid: int) -> list[str]:
    """Name each by its kind, or its path; numbers of sockets and pipes differ from one to the next."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(link)
            found.append(target.partition("[")[0] if ":[" in target else target)
    return sorted(found)


def _names(pid: int) -> list[str]:
    names = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            names.append((task / "comm").read_text().strip())
    return names


def has_interface(name: str) -> bool:
    """Whether there is a network interface of this name in our namespace."""
    return any(name == known for _, known in socket.if_nameindex())
