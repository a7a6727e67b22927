"""A VM under a debugger: its state words, and what they allow. The debugger of the fake engine is played."""

from __future__ import annotations

import pytest

from cloudvmm import api
from cloudvmm.api import VmState
from cloudvmm.engine.base import DebuggerContinued, DebuggerStopped
from support.wait import wait_until

from .conftest import DEADLINE_S


@pytest.fixture
def held(caller, vm_config):
    vm_config.gdb = True
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    return caller


def tell(caller, event):
    caller.engine.last_machine._report(event)


def wait_for_state(caller, state):
    wait_until(lambda: caller(api.vm_info).state is state, f"the state {state}", timeout_s=DEADLINE_S)


def test_vm_with_gdb_boots_into_a_breakpoint_and_is_resumed(held):
    assert held(api.vm_info).state is VmState.BREAK_POINT
    held(api.vm_resume)
    assert held(api.vm_info).state is VmState.RUNNING


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (api.vm_pause, "Invalid transition: InvalidStateTransition(BreakPoint, Paused)"),
        (api.vm_shutdown, "invalid VM state transition: BreakPoint to Shutdown"),
        (api.vm_delete, "invalid VM state transition: BreakPoint to Shutdown"),
    ],
)
def test_what_a_breakpoint_does_not_allow(held, command, words):
    assert held.refusal(command)[-1] == words
    assert held(api.vm_info).state is VmState.BREAK_POINT


def test_debugger_lets_it_go_and_stops_it(held):
    before = len(held.names())
    tell(held, DebuggerContinued())
    wait_for_state(held, VmState.RUNNING)
    tell(held, DebuggerStopped())
    wait_for_state(held, VmState.BREAK_POINT)
    assert held.names()[before:] == ["vm/resuming", "vm/resumed", "vm/pausing", "vm/paused"]
    held(api.vm_resume)


def test_debugger_lets_a_paused_vm_go(booted):
    booted(api.vm_pause)
    tell(booted, DebuggerContinued())
    wait_for_state(booted, VmState.RUNNING)


def test_vmm_ends_whatever_the_debugger_does(held):
    held(api.vmm_shutdown)
    assert held.names()[-2:] == ["vm/deleted", "vmm/shutdown"]
