"""Consoles on the terminal that the program was started on: raw while it runs, given back however it ends."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.attack import QEMU_NAME
from support.booted import READY_WORDS, direct_boot
from support.deadline import BOOT_S, HOST_S
from support.machine_code import boot_disk
from support.process import ProcessId, descendants_of
from support.vm import choose_engine
from support.wait import wait_until

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
NEEDS_SEABIOS = pytest.mark.skipif(not SEABIOS.exists(), reason=f"needs {SEABIOS}, of the package seabios")

pytestmark = [pytest.mark.qemu]


class Terminal:
    """A `cloudvmm` of the command line on a terminal of its own. Owns the terminal and the process."""

    def __init__(self, *flags: str) -> None:
        self.fd, self._theirs = pty.openpty()
        self._text = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cloudvmm.cli.main", *choose_engine("qemu").flags, *flags],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=subprocess.PIPE,
            # Whoever runs the tests may ignore it, as nohup does, and so would the program.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )

    def modes(self) -> int:
        """Return the terminal's local modes."""
        return termios.tcgetattr(self._theirs)[3]

    def wait_qemu(self) -> ProcessId:
        """Return the QEMU that runs the VM, once it does."""
        return wait_until(self._find_qemu, "QEMU runs", timeout_s=BOOT_S)

    def _find_qemu(self) -> ProcessId | None:
        words = "-nodefaults"
        found = (each for each in descendants_of(self.process.pid) if words in each.command.split())
        return next((each for each in found if QEMU_NAME in each.command), None)

    def read_until(self, words: bytes) -> bytes:
        """Return what was printed up to and with `words`."""
        deadline = time.monotonic() + BOOT_S
        while words not in self._text:
            readable, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert readable, f"{words!r} was not printed, only {self._text!r}"
            self._text += os.read(self.fd, 65536)
        head, found, self._text = self._text.partition(words)
        return head + found

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.communicate(timeout=HOST_S)
        finally:
            self.process.kill()
            os.close(self.fd)
            os.close(self._theirs)


@pytest.fixture
def on_terminal() -> Iterator[Any]:
    """Start `cloudvmm` with flags on a terminal; it is ended afterwards."""
    with contextlib.ExitStack() as undo:

        def start(*flags: str) -> Terminal:
            terminal = Terminal(*flags)
            undo.callback(terminal.close)
            return terminal

        yield start


@NEEDS_SEABIOS
def test_debug_console_on_the_terminal(on_terminal: Any, tmp_path: Path) -> None:
    flags = ["--firmware", str(SEABIOS), "--disk", f"path={boot_disk(tmp_path / 'boot.raw')},image_type=raw"]
    terminal: Terminal = on_terminal(*flags, "--debug-console", "tty", "--console", "off", "--serial", "null")
    terminal.read_until(b"hello")


def command_line(*words: str) -> list[str]:
    payload = direct_boot(*words)
    kernel = ["--kernel", payload["kernel"], "--initramfs", payload["initramfs"]]
    return [*kernel, "--cmdline", payload["cmdline"], "--memory", "size=256M"]


def test_serial_on_the_terminal_is_raw_while_the_guest_runs_and_restored_when_it_ends(
    on_terminal: Any,
) -> None:
    flags = command_line("cloudvmm.shell=interactive")
    terminal: Terminal = on_terminal(*flags, "--serial", "tty", "--console", "off")
    before = terminal.modes()
    terminal.read_until(b"busybox shell")
    assert not terminal.modes() & (termios.ICANON | termios.ECHO | termios.ISIG)
    terminal.type(b"tty; ls /dev/hvc0\n")
    terminal.read_until(b"\n/dev/ttyS0\r\n")
    terminal.read_until(b"No such file")
    terminal.type(b"\x03echo alive after $((1 + 1)) keys\n")  # Ctrl-C is the guest's
    terminal.read_until(b"alive after 2 keys")
    assert terminal.process.poll() is None
    terminal.type(b"poweroff -f\n")
    assert terminal.process.wait(HOST_S) == 0
    assert terminal.modes() == before


def test_console_is_on_the_terminal_unless_told_otherwise(on_terminal: Any) -> None:
    terminal: Terminal = on_terminal(*command_line("console=hvc0", "cloudvmm.shell=off"))
    before = terminal.modes()
    terminal.read_until(READY_WORDS.encode())
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(HOST_S) == 0
    assert terminal.modes() == before


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name
)
def test_terminal_is_given_back_whatever_ends_the_manager(on_terminal: Any, number: signal.Signals) -> None:
    terminal: Terminal = on_terminal(*command_line("cloudvmm.shell=off"))
    before = terminal.modes()
    qemu = terminal.wait_qemu()
    assert not terminal.modes() & termios.ICANON
    terminal.process.send_signal(number)
    status = terminal.process.wait(HOST_S)
    assert status == (0 if number is signal.SIGINT else -number)
    wait_until(lambda: terminal.modes() == before, "the terminal is as it was", timeout_s=HOST_S)
    wait_until(lambda: not qemu.is_alive(), "QEMU is gone", timeout_s=HOST_S)


def test_terminal_is_given_back_when_qemu_is_killed(on_terminal: Any) -> None:
    terminal: Terminal = on_terminal(*command_line("cloudvmm.shell=off"))
    before = terminal.modes()
    terminal.wait_qemu().kill()
    assert terminal.process.wait(HOST_S) == 1
    assert terminal.modes() == before
