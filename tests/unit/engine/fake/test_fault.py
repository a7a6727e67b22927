"""Do injected faults strike when and as often as they are told to?"""

from __future__ import annotations

import threading
import time

import pytest

from cloudvmm.config.net import NetConfig
from cloudvmm.config.number import MIB
from cloudvmm.engine.base import EngineTimeout, Exited, MachineGone, PayloadError, SentTo
from cloudvmm.engine.fake import Delay, Die, Fail, FakeEngine, Faults, Hang
from cloudvmm.engine.fake.fault import OPERATIONS

CALLS = {
    "boot": lambda machine: machine.boot(),
    "pause": lambda machine: machine.pause(),
    "resume": lambda machine: machine.resume(),
    "power_button": lambda machine: machine.power_button(),
    "nmi": lambda machine: machine.nmi(),
    "coredump": lambda machine: machine.coredump(-1),
    "add_device": lambda machine: machine.add_device(NetConfig(id="new"), 9),
    "remove_device": lambda machine: machine.remove_device("_net1"),
    "resize_vcpus": lambda machine: machine.resize_vcpus(1),
    "add_memory": lambda machine: machine.add_memory(128 * MIB),
    "request_zone_size": lambda machine: machine.request_zone_size("mem0", 2 * MIB),
    "resize_balloon": lambda machine: machine.resize_balloon(1 * MIB),
    "resize_disk": lambda machine: machine.resize_disk("_disk0", 8192),
    "counters": lambda machine: machine.counters(),
    "pci_resources": lambda machine: machine.pci_resources(),
    "save": lambda machine: machine.save("/nonexistent"),
    "freeze_disks": lambda machine: machine.freeze_disks({}),
    "send": lambda machine: machine.send(SentTo(link_fd=-1)),
    "transfer_rest": lambda machine: machine.transfer_rest(),
    "fork": lambda machine: machine.fork({}),
    "close": lambda machine: machine.close(),
}
CHANGES = {
    "add_device",
    "remove_device",
    "resize_vcpus",
    "add_memory",
    "request_zone_size",
    "resize_balloon",
    "resize_disk",
}
# The operations after which each call is allowed.
BEFORE = {
    "pause": ["boot"],
    "resume": ["boot", "pause"],
    "coredump": ["boot", "pause"],
    "save": ["boot", "pause"],
    "freeze_disks": ["boot", "pause"],
    "send": ["boot", "pause"],
    "transfer_rest": ["boot"],
    "fork": ["boot"],
    **{change: ["boot"] for change in CHANGES},
}


def test_every_operation_of_a_machine_is_tried_here():
    assert set(CALLS) | {"build", "check_postcopy"} == OPERATIONS


@pytest.mark.parametrize("operation", sorted(CALLS))
def test_failure_is_raised_and_leaves_the_machine_usable(machine, engine, operation):
    for before in BEFORE.get(operation, ()):
        CALLS[before](machine)
    phase = machine.phase
    engine.faults.set(operation, Fail(EngineTimeout, "No answer within 5 s"), times=1)
    with pytest.raises(EngineTimeout, match="No answer within 5 s"):
        CALLS[operation](machine)
    assert machine.phase is phase


def test_failure_of_build_is_raised(engine, spec):
    engine.faults.set("build", Fail(PayloadError))
    with pytest.raises(PayloadError):
        engine.build(spec)


def test_error_in_the_place_of_a_fault_is_refused_where_it_is_set(engine):
    with pytest.raises(TypeError, match="is no fault"):
        engine.faults.set("build", PayloadError("The kernel is invalid"))


@pytest.mark.parametrize("operation", sorted(CALLS.keys() - {"close"}))
def test_death_is_reported_as_the_last_event(machine, engine, operation):
    for before in BEFORE.get(operation, ()):
        CALLS[before](machine)
    engine.faults.set(operation, Die("Out of memory"))
    with pytest.raises(MachineGone):
        CALLS[operation](machine)
    assert machine.take_events()[-1] == Exited("Out of memory")


def test_death_while_closing_still_closes(machine, engine):
    engine.faults.set("close", Die())
    machine.close()
    with pytest.raises(MachineGone):
        machine.boot()


@pytest.mark.parametrize("fault", [Hang(), Delay(3600.0)])
@pytest.mark.parametrize("operation", ["boot", "counters"])
def test_wait_ends_with_kill(machine, engine, operation, fault):
    engine.faults.set(operation, fault)
    killer = threading.Timer(0.05, machine.kill)
    killer.start()
    with pytest.raises(MachineGone):
        CALLS[operation](machine)
    killer.join()


def test_close_that_hangs_ends_with_kill(machine, engine):
    engine.faults.set("close", Hang())
    killer = threading.Timer(0.05, machine.kill)
    killer.start()
    machine.close()
    killer.join()
    assert machine.take_events() == []


def test_reader_does_not_wait_for_a_call_that_hangs(running, engine):
    engine.faults.set("pause", Hang())
    caller = threading.Thread(target=_pause_until_gone, args=(running,), daemon=True)
    caller.start()
    assert running.counters()
    assert running.pci_resources()
    assert caller.is_alive()
    running.kill()
    caller.join()


def test_delay_takes_its_time_and_goes_on(machine, engine):
    engine.faults.set("boot", Delay(0.05))
    started = time.monotonic()
    machine.boot()
    assert time.monotonic() - started >= 0.05


def test_latency_is_the_time_of_every_blocking_operation(spec):
    engine = FakeEngine(latency_s=0.02)
    started = time.monotonic()
    machine = engine.build(spec)
    machine.boot()
    machine.pause()
    assert time.monotonic() - started >= 0.06
    machine.close()


def test_fault_strikes_as_often_as_it_was_told():
    faults = Faults({"nmi": Hang()})
    faults.set("pause", Hang(), times=2)
    assert [faults.take("pause") for _ in range(3)] == [Hang(), Hang(), None]
    assert [faults.take("nmi") for _ in range(3)] == [Hang()] * 3


def test_cleared_fault_does_not_strike():
    faults = Faults({"nmi": Hang(), "pause": Hang(), "boot": Hang()})
    faults.clear("nmi")
    assert faults.take("nmi") is None
    assert faults.take("pause") == Hang()
    faults.clear()
    assert faults.take("boot") is None


def test_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="fly"):
        Faults({"fly": Hang()})


def test_fault_that_never_strikes_is_refused():
    with pytest.raises(ValueError, match="0 times"):
        Faults().set("nmi", Hang(), times=0)


def _pause_until_gone(machine):
    with pytest.raises(MachineGone):
        machine.pause()
