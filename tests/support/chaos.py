"""What can go wrong between a VMM and its QEMU, at each step of each command, and what must hold then.

`relayed.py` strikes. A step is a command of QMP; `Chaos.steps` tells how many a command of the API takes.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from support.attack import Held, assert_holds_no_more, bare_config, find_qemu
from support.deadline import HOST_S
from support.process import state_of
from support.relayed import Plan
from support.rest import Reply
from support.server import Server
from support.vm import choose_engine
from support.vmm import error_words
from support.wait import wait_until

ANSWER_S: Final = 30.0  # with a fault that a command need not wait out
SLOW_ANSWER_S: Final = 100.0  # with one that it has to: its own deadlines
MIB: Final = 1 << 20

# Command to the state that it begins in.
COMMANDS: Final = {
    "vm.boot": "created",
    "vm.pause": "running",
    "vm.resume": "paused",
    "vm.counters": "running",
    "vm.nmi": "running",
    "vm.power-button": "running",
    "vm.add-disk": "running",
    "vm.remove-device": "running",
    "vm.resize": "running",
    "vm.resize-disk": "running",
    "vm.snapshot": "paused",
    "vm.restore": "none",
    "vm.coredump": "running",
    "vm.reboot": "running",
    "vm.shutdown": "running",
    "vm.delete": "running",
}
FAULTS: Final = (
    *("kill", "halt", "late", "cut", "garbage", "half", "other value", "other id", "refuse"),
    *("hold events", "repeat events", "empty events"),
)
SLOW_FAULTS: Final = ("freeze", "drop")
# The host's: the step is how many descriptors are left, or blocks of the disk that things are written to.
HOST_FAULTS: Final = {"few descriptors": range(12), "full disk": range(0, 24, 4)}
WRITES: Final = ("vm.snapshot", "vm.coredump")
_BLOCK_BYTES: Final = 4096
_DISK_BYTES: Final = 1 << 20


# What is in a state folder without a VM.
_OF_THE_VMM: Final = frozenset({"lock", "format", "journal", "vm", "events"})

# What Python says of a mistake in a program: an answer in another form must not look like one.
_WORDS_OF_PYTHON: Final = re.compile(r"'\w+' object |indices must be|Traceback|^'\w+'$|\w+Error\b")


class Chaos:
    """A server with relays, that keeps its VMM when a VM is gone. Owns it; `folder` is empty.

    With `has_state` its VMs would outlive it.
    """

    def __init__(self, folder: Path, *, has_state: bool = False) -> None:
        self._folder = folder
        self._relay = folder / "relay"
        self._relay.mkdir()
        self._state = folder / "state"
        self._target = folder  # where commands write to
        self._plans = self._made = 0
        self._engine = choose_engine("qemu")
        state = ["--state-dir", str(self._state)] if has_state else []
        self.server = Server(
            folder / "server",
            [*self._engine.flags, "--no-shutdown", *state],
            program=("support.relayed", str(self._relay)),
        )
        self.server.wait_ready()
        self.vmm = self.server.vmm
        self._begin("none")
        self._snapshot()
        self.held = Held(self.server.pid)

    def close(self) -> None:
        self.server.check_end()

    def steps(self, command: str) -> list[str]:
        """Return the commands of QMP that `command` takes, in order."""
        self._begin(COMMANDS[command])
        number = self._plan(Plan(0))
        reply = self._call(command)
        assert reply.status in (200, 204), error_words(reply)
        self._end()
        try:
            return (self._relay / f"steps{number}").read_text().split()
        except FileNotFoundError:
            return []

    def strike(self, command: str, *, step: int, fault: str) -> None:
        """Have `fault` strike at `step` of `command`, and fail unless all holds that must."""
        self._begin(COMMANDS[command])
        with self._striking(step, fault):
            limit_s = SLOW_ANSWER_S if fault in SLOW_FAULTS else ANSWER_S
            started = time.monotonic()
            reply = self._call(command)
            took_s = time.monotonic() - started
            assert took_s < limit_s, f"{command} took {took_s:.1f} s"
            self._check_answer(reply)
            self._check_serves()
        self._check_vm()
        self._end()
        self._begin("running")  # whatever happened, the next VM is as good as any
        self._end()

    @contextlib.contextmanager
    def _striking(self, step: int, fault: str) -> Iterator[None]:
        if fault == "few descriptors":
            before = resource.prlimit(self.server.pid, resource.RLIMIT_NOFILE)
            count = len(os.listdir(f"/proc/{self.server.pid}/fd"))
            resource.prlimit(self.server.pid, resource.RLIMIT_NOFILE, (count + step, before[1]))
            yield
            resource.prlimit(self.server.pid, resource.RLIMIT_NOFILE, before)
        elif fault == "full disk":
            with self._small_disk(free_blocks=step):
                yield
        else:
            self._plan(Plan(0, step=step, fault=fault))
            yield
            self._plan(Plan(0))

    @contextlib.contextmanager
    def _small_disk(self, *, free_blocks: int) -> Iterator[None]:
        """Have what is made lie on a disk with so much room."""
        target = self._folder / "small"
        target.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "small", target], check=True)
        self._target = target
        try:
            with contextlib.suppress(OSError), open(target / "ballast", "wb", buffering=0) as ballast:
                while ballast.write(bytes(_BLOCK_BYTES)):
                    pass
            os.truncate(target / "ballast", max(0, _DISK_BYTES - free_blocks * _BLOCK_BYTES))
            yield
        finally:
            self._target = self._folder
            subprocess.run(["umount", "-l", target], check=True)

    # Where a command begins, and what is left

    def _begin(self, state: str) -> None:
        if state == "none":
            return
        self.vmm.put("vm.create", self._config())
        if state != "created":
            self.vmm.put("vm.boot")
        if state == "paused":
            self.vmm.put("vm.pause")

    def _end(self) -> None:
        reply = self.vmm.exchange("PUT", "vm.delete")
        assert reply.status in (204, 404, 500), error_words(reply)
        assert not self._has_vm(), error_words(reply)
        wait_until(lambda: find_qemu(self.server) is None, "QEMU is gone", timeout_s=HOST_S)
        assert_holds_no_more(self.server.pid, self.held)
        left = [name for name in os.listdir(self.server.folder) if name not in ("api", "api.lock")]
        assert not left, left
        if self._state.exists():
            left = [name for name in os.listdir(self._state) if name not in _OF_THE_VMM]
            assert not left, left
        for path in self._folder.glob("made-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _snapshot(self) -> None:
        """Make what is restored."""
        self._begin("paused")
        saved = self._folder / "saved"
        saved.mkdir()
        self.vmm.put("vm.snapshot", {"destination_url": f"file://{saved}"})
        self.vmm.put("vm.delete")
        wait_until(lambda: find_qemu(self.server) is None, "QEMU is gone", timeout_s=HOST_S)

    def _config(self) -> dict[str, Any]:
        disk = self._folder / "disk"
        if not disk.exists():
            disk.write_bytes(bytes(MIB))
        return bare_config(
            self._engine,
            self._folder,
            disks=[{"path": str(disk), "image_type": "Raw", "id": "d0"}],
            memory={"size": 64 * MIB, "hotplug_method": "VirtioMem", "hotplug_size": 128 * MIB},
        )

    def _body(self, command: str) -> Any:
        self._made += 1
        made = self._target / f"made-{self._made}"
        match command:
            case "vm.add-disk":
                made.write_bytes(bytes(MIB))
                return {"path": str(made), "image_type": "Raw", "id": "d1"}
            case "vm.remove-device":
                return {"id": "d0"}
            case "vm.resize":
                return {"desired_ram": 128 * MIB}
            case "vm.resize-disk":
                return {"id": "d0", "desired_size": MIB}
            case "vm.snapshot":
                made.mkdir()
                return {"destination_url": f"file://{made}"}
            case "vm.restore":
                return {"source_url": f"file://{self._folder / 'saved'}"}
            case "vm.coredump":
                return {"destination_url": f"file://{made}"}
        return None

    def _call(self, command: str) -> Reply:
        method = "GET" if command == "vm.counters" else "PUT"
        return self.vmm.exchange(method, command, self._body(command))

    def _plan(self, plan: Plan) -> int:
        self._plans += 1
        fresh = self._relay / "plan.new"
        fresh.write_bytes(msgspec.json.encode(Plan(self._plans, plan.step, plan.fault)))
        fresh.rename(self._relay / "plan")
        return self._plans

    # What must hold

    def _check_answer(self, reply: Reply) -> None:
        """A success, or an error in the API's form."""
        if reply.status not in (200, 204):
            assert reply.status in (400, 404, 409, 429, 500), reply.raw
            texts = reply.texts()
            assert texts and all(texts), reply.raw
            is_strange = _WORDS_OF_PYTHON.search(texts[-1]) is not None
            assert not is_strange or texts[-2].startswith("The VMM failed inside: "), texts

    def _check_serves(self) -> None:
        assert self.server.is_running, self.server.stderr
        self.vmm.get("vmm.ping")

    def _check_vm(self) -> None:
        """It runs, its QEMU with it, or there is neither."""

        def agrees() -> bool:
            qemu = find_qemu(self.server)
            state = self._word()
            if state in ("Running", "Paused"):
                return qemu is not None and state_of(qemu.pid) not in ("", "Z")
            return True

        wait_until(agrees, "the VM is what vm.info says", timeout_s=HOST_S)
        qemu = find_qemu(self.server)
        if self._word() == "Running" and qemu is not None and state_of(qemu.pid) != "T":
            with contextlib.suppress(AssertionError):
                self.vmm.put("vm.pause")

    def _word(self) -> str | None:
        """Return the VM's state."""
        reply = self.vmm.exchange("GET", "vm.info")
        return msgspec.json.decode(reply.body)["state"] if reply.status == 200 else None

    def _has_vm(self) -> bool:
        return self._word() is not None
