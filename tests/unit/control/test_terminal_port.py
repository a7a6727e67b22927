"""The process's own terminal as a console: never held up, and given back as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import termios

from cloudvmm.host.terminal import RawTerminal

PROGRAM = """
import os, sys
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, SerialConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.console import open_consoles

tty = ConsoleOutputMode.TTY
consoles = open_consoles(VmConfig(serial=SerialConfig(mode=tty), console=ConsoleConfig(mode=tty)))
for sink in consoles.sinks()[:2]:
    os.write(sink.stream_fd, b"x" * 100_000)
consoles.close()
os.write(2, b"closed")
"""
DEADLINE_S = 20.0


def echoes(fd: int) -> bool:
    return bool(termios.tcgetattr(fd)[3] & termios.ECHO)


def run_on(fd: int) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        stdin=fd,
        stdout=fd,
        stderr=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=True,
    )
    return finished.stderr.decode()


def test_two_consoles_on_a_terminal_nobody_reads_end_at_once_and_give_it_back():
    master, slave = os.openpty()
    try:
        assert echoes(slave)
        assert run_on(slave) == "closed"
        assert echoes(slave)
    finally:
        os.close(master)
        os.close(slave)


def test_a_pipe_that_nobody_reads_holds_nothing_up():
    reader, writer = os.pipe()
    try:
        assert run_on(writer) == "closed"
        assert len(os.read(reader, 1 << 20)) > 0
    finally:
        os.close(reader)
        os.close(writer)


def test_raw_mode_is_taken_back():
    master, slave = os.openpty()
    terminal = RawTerminal(slave)
    assert not echoes(slave)

    terminal.restore()

    assert echoes(slave)
    os.close(master)
    os.close(slave)
