"""Whose will it is that the guest stops and runs."""

from __future__ import annotations

import pytest

from cloudvmm.engine.base import DebuggerContinued, DebuggerStopped
from cloudvmm.engine.qemu.debugger import DebuggerNotServed, DebugWatch, serve_debugger

STOPPED, CONTINUED = [DebuggerStopped()], [DebuggerContinued()]


@pytest.fixture
def running():
    watch = DebugWatch()
    watch.want(is_to_run=True)
    assert watch.hear_resume() == []
    return watch


def test_guest_that_waits_for_a_debugger_is_let_go_by_it():
    assert DebugWatch().hear_resume() == CONTINUED


@pytest.mark.parametrize("status", ["debug", "paused"])
def test_debugger_stops_it_and_lets_it_go_on(running, status):
    assert running.judge_stop(status, running.turn) == STOPPED
    assert running.hear_resume() == CONTINUED
    assert running.judge_stop(status, running.turn) == STOPPED


@pytest.mark.parametrize("status", ["shutdown", "internal-error", "io-error", "watchdog", "running", None])
def test_other_stops_are_not_the_debuggers(running, status):
    assert running.judge_stop(status, running.turn) == []


def test_what_we_will_is_not_the_debuggers(running):
    running.want(is_to_run=False)
    assert running.judge_stop("paused", running.turn) == []
    running.want(is_to_run=True)
    assert running.hear_resume() == []


def test_guest_that_we_let_go_on_from_a_breakpoint_was_let_go_by_us(running):
    assert running.judge_stop("debug", running.turn) == STOPPED
    running.want(is_to_run=True)
    assert running.hear_resume() == []


def test_paused_guest_is_let_go_by_a_debugger(running):
    running.want(is_to_run=False)
    assert running.hear_resume() == CONTINUED
    assert running.judge_stop("debug", running.turn) == STOPPED


def test_answer_that_comes_when_the_guest_runs_again_says_nothing(running):
    turn = running.turn
    running.hear_resume()
    assert running.judge_stop("debug", turn) == []


class Refusing:
    def execute(self, command, *_, **__):
        return "Could not open gdbserver on device 'chardev:gdb'\r\n"


def test_qemu_that_serves_none_says_so():
    with pytest.raises(DebuggerNotServed, match="^Could not open gdbserver on device 'chardev:gdb'$"):
        serve_debugger(Refusing(), 0)
