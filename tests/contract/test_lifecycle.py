"""Does an engine build, boot, pause, resume and end a machine as `engine.base` says?"""

from __future__ import annotations

import threading

import msgspec
import pytest

from cloudvmm.engine.base import (
    Exited,
    MachineGone,
    PoweredOff,
    ResetRequested,
    VcpuStarted,
)
from support.deadline import GUEST_S
from support.wait import is_readable, wait_event
from support.watch import Watch

# How long a guest is given to do what it must not do.
SILENCE_S = 0.3
SOON_S = 5.0


def test_build_starts_no_vcpu(machine_built, player):
    assert not is_readable(player.console_end.fileno(), timeout_s=SILENCE_S)
    # A vCPU's thread may be there, and be told of, before the vCPU runs.
    assert all(isinstance(event, VcpuStarted) for event in machine_built.take_events())


def test_booted_guest_says_that_it_is_ready_and_answers(machine_running, player):
    player.wait_ready()
    player.ping("hello")
    assert player.hears("hello", timeout_s=GUEST_S)


def test_paused_guest_answers_only_after_resume(machine_running, player):
    player.wait_ready()
    machine_running.pause()
    player.ping("stillness")
    assert not player.hears("stillness", timeout_s=SILENCE_S)
    machine_running.resume()
    assert player.hears("stillness", timeout_s=GUEST_S)


def test_guest_that_is_to_wait_for_a_debugger_stands_still_at_its_boot(engine, spec, player):
    waiting = msgspec.structs.replace(spec.vm_config, gdb=True)
    machine = engine.build(msgspec.structs.replace(spec, vm_config=waiting))
    machine.boot()
    assert not player.hears("ready uptime=", timeout_s=SILENCE_S)
    machine.resume()
    player.wait_ready()
    machine.close()


def test_machine_can_be_paused_and_resumed_again(machine_paused):
    machine_paused.resume()
    machine_paused.pause()
    machine_paused.resume()
    assert not [event for event in machine_paused.take_events() if isinstance(event, Exited)]


def test_power_button_and_nmi_return_before_the_guest_reacts(machine_running):
    with Watch() as watch:
        machine_running.power_button()
        machine_running.nmi()
    assert watch.elapsed_s < SOON_S


def test_guest_power_off_is_reported_and_leaves_the_machine_closable(machine_running, player):
    player.wait_ready()
    player.power_off(machine_running)
    events = wait_event(machine_running, PoweredOff, timeout_s=GUEST_S)
    assert not [event for event in events if isinstance(event, Exited | ResetRequested)]
    machine_running.close()


def test_guest_reset_is_reported_and_the_guest_stands_still(machine_running, player):
    player.wait_ready()
    player.reset(machine_running)
    events = wait_event(machine_running, ResetRequested, timeout_s=GUEST_S)
    assert not [event for event in events if isinstance(event, Exited | PoweredOff)]
    player.ping("afterlife")
    assert not player.hears("afterlife", timeout_s=SILENCE_S)


def test_death_of_the_machine_is_the_last_event(machine_running, player):
    player.end_machine(machine_running)
    events = wait_event(machine_running, Exited, timeout_s=SOON_S)
    assert isinstance(events[-1], Exited)
    assert events[-1].reason
    assert machine_running.take_events() == []
    with pytest.raises(MachineGone):
        machine_running.pause()


def test_close_is_idempotent(machine_running):
    machine_running.close()
    machine_running.close()
    with pytest.raises(MachineGone):
        machine_running.pause()


def test_close_of_a_machine_that_never_booted(machine_built):
    machine_built.close()
    with pytest.raises(MachineGone):
        machine_built.boot()


def test_kill_is_idempotent_and_close_follows(machine_running):
    machine_running.kill()
    machine_running.kill()
    with pytest.raises(MachineGone):
        machine_running.pause()
    machine_running.close()
    machine_running.kill()


def test_kill_from_another_thread_ends_a_blocking_call(engine, machine_running, player):
    player.hang(engine, machine_running)
    outcome = []
    thread = threading.Thread(target=_record, args=(machine_running.pause, outcome), daemon=True)
    thread.start()
    thread.join(SILENCE_S)
    assert thread.is_alive(), "The call was to hang"
    machine_running.kill()
    thread.join(SOON_S)
    assert not thread.is_alive(), "The call did not end soon after kill"
    assert isinstance(outcome[0], MachineGone)


def test_abort_build_ends_a_build_under_way(player, spec, tmp_path):
    engine = player.engine_that_hangs_in_build(tmp_path)
    outcome = []
    thread = threading.Thread(target=_record, args=(lambda: engine.build(spec), outcome), daemon=True)
    thread.start()
    thread.join(SILENCE_S)
    assert thread.is_alive(), "The build was to hang"
    engine.abort_build()
    thread.join(SOON_S)
    assert not thread.is_alive(), "The build did not end soon after abort_build"
    assert isinstance(outcome[0], MachineGone)


def test_abort_build_without_a_build_does_no_harm(engine, spec):
    engine.abort_build()
    machine = engine.build(spec)
    machine.boot()
    assert not [event for event in machine.take_events() if isinstance(event, Exited)]
    machine.close()


def _record(call, outcome):
    try:
        outcome.append(call())
    except Exception as error:
        outcome.append(error)
