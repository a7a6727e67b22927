"""Playing the guest, per engine: what the contract suite needs a guest to do, and to have done to it.

A player is made before the machine; `console_end` is our end of the stream that is the guest's console.
A ping is a line `ping WORD`; a guest that runs answers with a line that has WORD in it, the fake by echoing.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.config.payload import PayloadConfig
from cloudvmm.engine.base import Engine, Machine
from cloudvmm.engine.fake import FakeEngine, FakeMachine, Hang
from cloudvmm.guest import FAST_CMDLINE
from support.accelerator import accelerator
from support.deadline import BOOT_S
from support.guest import find_guest, import_or_skip
from support.process import what_children_do
from support.qemu import look_apart
from support.wait import is_readable

READ_BYTES = 65536


class Player:
    """What holds for every engine. `ready_timeout_s` bounds the way from `boot` to a guest that answers."""

    ready_timeout_s: float

    def __init__(self, console_end: socket.socket, guest_end: socket.socket) -> None:
        self.console_end = console_end
        self.guest_end = guest_end
        self._heard = b""

    def ping(self, word: str) -> None:
        self.console_end.sendall(f"ping {word}\n".encode())

    def hears(self, word: str, *, timeout_s: float) -> bool:
        """Tell whether `word` comes over the console in time; what comes up to there is used up."""
        deadline = time.monotonic() + timeout_s
        while word.encode() not in self._heard:
            if not is_readable(self.console_end.fileno(), timeout_s=max(0.0, deadline - time.monotonic())):
                return False
            data = self.console_end.recv(READ_BYTES)
            if not data:
                return False
            self._heard += data
        self._heard = self._heard.partition(word.encode())[2]
        return True

    def wait_ready(self) -> None:
        assert self.hears("ready uptime=", timeout_s=self.ready_timeout_s), f"No ready line: {self._heard!r}"


class FakePlayer(Player):
    ready_timeout_s = 5.0

    def __init__(self, console_end: socket.socket, guest_end: socket.socket, folder: Path) -> None:
        super().__init__(console_end, guest_end)
        kernel, initramfs = folder / "kernel", folder / "initramfs"
        kernel.write_bytes(b"a kernel")
        initramfs.write_bytes(b"an initramfs")
        self.payload = PayloadConfig(kernel=str(kernel), initramfs=str(initramfs), cmdline="quiet")

    @staticmethod
    def engine() -> FakeEngine:
        return FakeEngine()

    @staticmethod
    def engine_that_hangs_in_build(folder: Path) -> FakeEngine:
        engine = FakeEngine()
        engine.faults.set("build", Hang())
        return engine

    def hang(self, engine: Engine, machine: Machine) -> None:
        """Let the next blocking call on `machine` not come back."""
        assert isinstance(engine, FakeEngine)
        for operation in ("pause", "resume", "nmi"):
            engine.faults.set(operation, Hang(), times=1)

    def end_machine(self, machine: Machine) -> None:
        assert isinstance(machine, FakeMachine)
        machine.die("The machine died of a test")

    def power_off(self, machine: Machine) -> None:
        assert isinstance(machine, FakeMachine)
        machine.guest.power_off()

    def reset(self, machine: Machine) -> None:
        assert isinstance(machine, FakeMachine)
        machine.guest.reset()

    def read_disk(self) -> None:
        """Nothing to do: the fake guest reads its disks all the time."""


class QemuPlayer(Player):
    ready_timeout_s = BOOT_S

    def __init__(self, console_end: socket.socket, guest_end: socket.socket, folder: Path) -> None:
        super().__init__(console_end, guest_end)
        guest = find_guest()
        # The kernel's console is the serial port, so that the virtio console is the shell service's alone.
        self.payload = PayloadConfig(kernel=guest.kernel, initramfs=guest.initramfs, cmdline=FAST_CMDLINE)
        self._scripts = 0

    @staticmethod
    def engine(binary: str | None = None) -> Any:
        qemu = import_or_skip("cloudvmm.engine.qemu")
        if not hasattr(qemu, "QemuEngine"):
            pytest.skip("cloudvmm.engine.qemu has no QemuEngine yet")
        if shutil.which("qemu-system-x86_64") is None:
            pytest.skip("The program qemu-system-x86_64 is missing")
        return qemu.QemuEngine(binary=binary, accel=accelerator())

    @classmethod
    def engine_that_hangs_in_build(cls, folder: Path) -> Any:
        """An engine whose QEMU is itself until its properties are known, and never answers from then on."""
        deaf, wrapper = folder / "deaf", folder / "qemu-system-x86_64"
        binary = shutil.which("qemu-system-x86_64")
        wrapper.write_text(f'#!/bin/sh\n[ ! -e {deaf} ] || exec sleep 300\nexec {binary} "$@"\n')
        wrapper.chmod(0o755)
        engine = cls.engine(str(wrapper))
        look_apart(engine, folder / "cache")
        deaf.touch()
        return engine

    def hang(self, engine: Engine, machine: Machine) -> None:
        """Let the next blocking call on `machine` not come back."""
        assert machine.process_id is not None
        os.kill(machine.process_id, signal.SIGSTOP)

    def end_machine(self, machine: Machine) -> None:
        assert machine.process_id is not None
        os.kill(machine.process_id, signal.SIGKILL)

    def power_off(self, machine: Machine) -> None:
        self._run("poweroff")

    def reset(self, machine: Machine) -> None:
        self._run("reboot")

    def read_disk(self) -> None:
        self._run("dd if=/dev/vda of=/dev/null bs=4k count=16")

    def wait_ready(self) -> None:
        """The shell service announces itself after the guest's own ready line: only then it listens."""
        if not self.hears("@cvm ready", timeout_s=self.ready_timeout_s):
            raise AssertionError(f"No shell service: {self._heard!r}\n{what_children_do()}")

    def _run(self, script: str) -> None:
        """Send `script` to the guest's shell service; what it says is not waited for."""
        self._scripts += 1
        request = b"run %d %s\n" % (self._scripts, base64.b64encode(script.encode()))
        self.console_end.sendall(request)


PLAYERS: dict[str, type[FakePlayer] | type[QemuPlayer]] = {"fake": FakePlayer, "qemu": QemuPlayer}
