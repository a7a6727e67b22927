"""The VM that tests of the whole program run: its flags per engine, its config, and how its guest is heard.

On QEMU it is the default guest, whose shell service listens on the virtio console (hvc0, a PTY) and whose
kernel writes to the serial port (a file). The fake's guest says its ready line on both and
echoes the console.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloudvmm.guest import FAST_CMDLINE
from cloudvmm.guest.shell import GuestShell
from support.accelerator import accelerator
from support.deadline import BOOT_S, HOST_S
from support.guest import find_guest, import_or_skip
from support.vmm import Vmm
from support.wait import is_readable, wait_until

MIB = 1024 * 1024
RAM_BYTES = 256 * MIB
READY_WORDS = b"cloudvmm-guest ready"
READY_TIMEOUT_S = {"fake": HOST_S, "qemu": BOOT_S}


class EngineChoice(msgspec.Struct, frozen=True):
    """`flags` make the server run VMs with the engine of this `name`."""

    name: str
    flags: tuple[str, ...]

    @property
    def ready_timeout_s(self) -> float:
        """How long the guest may take from boot until it answers."""
        return READY_TIMEOUT_S[self.name]

    def payload(self, folder: Path) -> dict[str, str]:
        """Return the JSON form of a payload that this engine boots; skip where there is none."""
        if self.name == "fake":
            kernel, initramfs = folder / "kernel", folder / "initramfs"
            kernel.write_bytes(b"a kernel")
            initramfs.write_bytes(b"an initramfs")
            return {"kernel": str(kernel), "initramfs": str(initramfs), "cmdline": FAST_CMDLINE}
        guest = find_guest()
        return {"kernel": guest.kernel, "initramfs": guest.initramfs, "cmdline": FAST_CMDLINE}


def choose_engine(name: str) -> EngineChoice:
    """Return the engine called `name`; skip, saying what is missing, where it cannot be used."""
    if name == "qemu":
        import_or_skip("cloudvmm.engine.qemu.engine")
        if shutil.which("qemu-system-x86_64") is None:
            pytest.skip("The program qemu-system-x86_64 is missing")
        return EngineChoice(name, ("--engine", "qemu", "--accel", accelerator()))
    return EngineChoice(name, ("--engine", "fake"))


def small_config(engine: EngineChoice, folder: Path) -> dict[str, Any]:
    """Return the JSON form of a VM with one vCPU, an entropy source, and consoles as said above."""
    return {
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": RAM_BYTES},
        "payload": engine.payload(folder),
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "File", "file": str(folder / "kernel.log")},
        "console": {"mode": "Pty"},
    }


class Guest:
    """What a booted guest says and hears. Owns the descriptor of its console's PTY.

    `shell` runs scripts inside the guest; the fake's guest has none and asking for it skips the test.
    """

    def __init__(self, vmm: Vmm, engine: EngineChoice) -> None:
        self._engine = engine
        config = vmm.get("vm.info")["config"]
        self.kernel_log = Path(config["serial"]["file"])
        self.console_path: str = config["console"]["file"]
        self.console_fd = os.open(self.console_path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._heard = b""
        self._shell = GuestShell(self.console_fd)

    @property
    def shell(self) -> GuestShell:
        if self._engine.name == "fake":
            pytest.skip("The fake engine's guest has no shell")
        return self._shell

    def wait_ready(self) -> None:
        """Return when whatever listens on the console is there."""
        if self._engine.name == "qemu":
            self._shell.wait_ready(self._engine.ready_timeout_s)
        else:
            self.wait_hears(READY_WORDS)

    def wait_kernel_log(self, words: bytes) -> bytes:
        """Return all that the kernel log holds once `words` are in it."""

        def text() -> bytes | None:
            log = self.kernel_log.read_bytes()
            return log if words in log else None

        return wait_until(text, f"{words!r} in the kernel log", timeout_s=self._engine.ready_timeout_s)

    def wait_hears(self, words: bytes) -> None:
        """Return when `words` came over the console; what came up to them is used up."""
        deadline = time.monotonic() + self._engine.ready_timeout_s
        while words not in self._heard:
            if not is_readable(self.console_fd, timeout_s=max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"{words!r} did not come over the console, only {self._heard!r}")
            self._heard += os.read(self.console_fd, 4096)
        self._heard = self._heard.partition(words)[2]

    def close(self) -> None:
        os.close(self.console_fd)
