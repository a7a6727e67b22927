"""The process's own terminal as a console: never held up, and given back as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios

import pytest

from cloudvmm.host.terminal import RawTerminal
from support.leak import Holdings, children_of
from support.wait import wait_until

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


KILLED = """
import os, signal, sys
from cloudvmm.host.terminal import RawTerminal
# Who runs the tests may have these ignored, and a program that is started inherits that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
terminal = RawTerminal(0)
os.write(2, b"raw")
signal.pause()
"""


@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGHUP, signal.SIGINT])
def test_raw_mode_ends_with_a_process_that_is_killed(number, to_group):
    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=slave, stderr=subprocess.PIPE, process_group=0
    ) as process:
        try:
            assert process.stderr.read(3) == b"raw"
            assert not echoes(slave)
            (os.killpg if to_group else os.kill)(process.pid, number)
            process.wait(DEADLINE_S)
        finally:
            process.kill()
    wait_until(lambda: termios.tcgetattr(slave) == before, "the terminal is as it was", timeout_s=DEADLINE_S)
    os.close(master)
    os.close(slave)


def test_guard_goes_with_raw_mode():
    before = Holdings()
    master, slave = os.openpty()
    terminal = RawTerminal(slave)
    assert len(children_of(os.getpid()) - before.children) == 1
    terminal.restore()
    os.close(master)
    os.close(slave)
    before.assert_nothing_added(timeout_s=0)


def test_raw_mode_is_taken_back():
    master, slave = os.openpty()
    terminal = RawTerminal(slave)
    assert not echoes(slave)

    terminal.restore()

    assert echoes(slave)
    os.close(master)
    os.close(slave)
