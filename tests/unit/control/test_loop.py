"""Order, overtaking, events of the machine, and the promise that every request is answered."""

from __future__ import annotations

import os
import threading

import msgspec
import pytest

from cloudvmm import api
from cloudvmm.api.ping import Ping
from cloudvmm.config.console import ConsoleOutputMode, SerialConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.vmm import VmmThread
from cloudvmm.engine.base import EngineError, MachineGone
from cloudvmm.engine.fake import Fail, FakeEngine, Hang
from cloudvmm.errors import error_chain

from .conftest import DEADLINE_S, Caller


def test_reads_are_answered_while_a_boot_hangs(caller, vm_config, engine):
    engine.faults.set("boot", Hang())
    caller(api.vm_create, vm_config)
    boot = caller.beside(api.vm_boot)
    caller.wait_for_event("vm/booting")

    assert caller(api.vmm_ping).pid == os.getpid()
    assert caller(api.vm_info).state is api.VmState.CREATED
    assert not boot.is_done

    caller(api.vmm_shutdown)
    assert isinstance(boot.result(), api.VmBootError)


@pytest.mark.parametrize("operation", ["build", "boot", "pause", "coredump", "counters"])
def test_shutdown_of_the_vmm_overtakes_what_hangs(vm_config, tmp_path, operation):
    caller = Caller(FakeEngine())
    caller(api.vm_create, vm_config)
    function, data = api.vm_boot, []
    if operation not in ("build", "boot"):
        caller(api.vm_boot)
        function = {"pause": api.vm_pause, "coredump": api.vm_coredump, "counters": api.vm_counters}[
            operation
        ]
        data = [api.VmCoredumpData(destination_url=f"file://{tmp_path}/c")] if operation == "coredump" else []
    caller.engine.faults.set(operation, Hang())
    hung = caller.beside(function, *data)
    queued = caller.beside(api.vm_create, VmConfig())

    caller(api.vmm_shutdown)

    assert isinstance(hung.result(), api.ApiError)
    assert isinstance(queued.result(), api.VmCreateError)
    assert caller.vmm.join(DEADLINE_S)
    assert caller.vmm.failure is None
    caller.close()


def test_a_signal_ends_the_vmm_with_its_events_in_order(booted):
    booted.vmm.exit_evt.write()

    assert booted.vmm.join(DEADLINE_S)
    assert booted.names()[-3:] == ["vm/shutdown", "vm/deleted", "vmm/shutdown"]
    assert booted.vmm.failure is None


def test_requests_after_the_end_are_refused_not_lost(caller):
    caller(api.vmm_shutdown)
    assert caller.vmm.join(DEADLINE_S)

    assert caller.refusal(api.vmm_ping) == ["API request send error"]


def test_every_request_of_a_hundred_threads_has_one_answer_across_the_end(caller):
    answers: list[object] = []

    def ask() -> None:
        for _ in range(50):
            try:
                answers.append(caller(api.vmm_ping))
            except api.ApiError as error:
                answers.append(error)

    threads = [threading.Thread(target=ask) for _ in range(100)]
    for thread in threads:
        thread.start()
    caller(api.vmm_shutdown)
    for thread in threads:
        thread.join(DEADLINE_S)

    assert len(answers) == 5000
    assert all(isinstance(answer, api.VmmPingResponse | api.RequestSend) for answer in answers)


def test_guest_power_off_ends_the_vmm(booted, engine):
    engine.last_machine.guest.power_off()

    assert booted.vmm.join(DEADLINE_S)
    assert booted.names()[-3:] == ["vm/shutdown", "vm/deleted", "vmm/shutdown"]
    assert booted.vmm.failure is None


def test_guest_power_off_with_no_shutdown_keeps_the_config(engine, vm_config):
    caller = Caller(engine, no_shutdown=True)
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    engine.last_machine.guest.power_off()
    caller.wait_for_event("vm/shutdown")

    assert caller(api.vm_info).state is api.VmState.CREATED
    caller(api.vm_boot)
    caller.close()


def test_guest_reset_reboots(booted, engine):
    first = engine.last_machine

    first.guest.reset()
    booted.wait_for_event("vm/rebooted")

    assert engine.last_machine is not first
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_a_guest_reset_that_cannot_be_carried_out_ends_the_vmm(booted, engine):
    engine.faults.set("build", Fail(EngineError, "no machine"))

    engine.last_machine.guest.reset()

    assert booted.vmm.join(DEADLINE_S)
    assert booted.vmm.failure is not None


def test_guest_panic_is_told_and_the_vm_goes_on(booted, engine):
    engine.last_machine.guest.panic()
    booted.wait_for_event("guest/panic")

    assert booted.events[-1].properties == {"event": "panic"}
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_a_machine_that_dies_ends_the_vmm_and_says_why(booted, engine):
    engine.last_machine.die("QEMU was killed by signal 9 (SIGKILL)")

    assert booted.vmm.join(DEADLINE_S)
    assert "killed by signal 9" in str(booted.vmm.failure)
    assert booted.names()[-3:] == ["vm/shutdown", "vm/deleted", "vmm/shutdown"]


def test_a_machine_that_dies_with_no_shutdown_leaves_the_config(engine, vm_config):
    caller = Caller(engine, no_shutdown=True)
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)

    engine.last_machine.die()
    caller.wait_for_event("vm/shutdown")

    assert caller(api.vm_info).device_tree is None
    caller(api.vm_boot)
    caller.close()


def test_data_of_the_wrong_kind_is_refused_and_the_vmm_goes_on(booted):
    assert booted.refusal(api.vm_action, api.VmAction.COREDUMP) == [
        "The VM could not be coredumped",
        "vm.coredump takes a VmCoredumpData, not a NoneType",
    ]
    assert "takes a VmConfig, not a dict" in booted.refusal(api.vm_create, {})[-1]
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_each_request_is_logged_in_the_reference_s_words(booted):
    booted.requests.clear()
    booted(api.vmm_ping)
    booted(api.vm_info)
    booted.refusal(api.vm_remove_device, api.VmRemoveDeviceData(id="x"))

    assert booted.requests == [
        "debug: API request event: VmmPing",
        "info: API request event: VmInfo",
        "info: API request event: VmRemoveDevice VmRemoveDeviceData(id='x')",
    ]


class Unwritable(api.VmRemoveDeviceData):
    def __repr__(self) -> str:
        raise AssertionError("This is written")


def test_text_of_a_request_is_not_made_for_a_log_that_drops_it():
    said = []
    vmm = VmmThread(FakeEngine(), log=lambda level, text: said.append(text))
    with pytest.raises(api.ApiError):
        api.vm_remove_device(vmm.api_evt, vmm.api_sender, Unwritable(id="x"))
    vmm.exit_evt.write()
    assert vmm.join(DEADLINE_S)
    vmm.close()

    assert callable(said[0])
    with pytest.raises(AssertionError, match="written"):
        said[0]()


def test_every_vmm_shutdown_at_once_is_answered(vm_config):
    for _ in range(20):
        caller = Caller(FakeEngine())
        calls = [caller.beside(api.vmm_shutdown) for _ in range(4)]
        answers = [call.result() for call in calls]

        assert all(answer is None or isinstance(answer, api.RequestSend) for answer in answers)
        caller.close()


def test_a_fault_inside_the_loop_ends_the_vmm_in_order(booted, engine):
    def broken() -> list:
        raise RuntimeError("a bug")

    booted.engine.faults.set("pause", Hang())
    under_way = booted.beside(api.vm_pause)
    booted.wait_for_event("vm/pausing")
    queued = booted.beside(api.vm_resume)
    engine.last_machine.take_events = broken
    engine.last_machine.guest.panic()

    assert booted.vmm.join(DEADLINE_S)
    assert isinstance(under_way.result(), api.VmPauseError)
    assert isinstance(queued.result(), api.VmResumeError | api.RequestSend)
    assert "a bug" in str(booted.vmm.failure)
    assert booted.names()[-1] == "vmm/shutdown"


def test_a_machine_that_cannot_be_closed_is_killed_and_the_consoles_are_closed(caller, vm_config, tmp_path):
    vm_config.serial = SerialConfig(mode=ConsoleOutputMode.SOCKET, socket=str(tmp_path / "serial"))
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    machine = caller.engine.last_machine
    caller.engine.faults.set("close", Fail(EngineError, "stuck"), times=1)

    assert caller.refusal(api.vm_shutdown)[-1] == "stuck"
    with pytest.raises(MachineGone):
        machine.pause()
    assert not (tmp_path / "serial").exists()
    assert caller(api.vm_info).device_tree is None
    machine.close()


def test_an_answer_in_another_form_fails_the_command_alone(booted, engine):
    engine.last_machine.nmi = lambda: {}["status"]

    chain = booted.refusal(api.vm_nmi)

    assert chain[1:] == ["The VMM failed inside: KeyError('status')", "'status'"]
    assert "error: vm.nmi failed: The VMM failed inside: KeyError('status'): 'status'" in booted.logged
    assert booted(api.vm_info).state is api.VmState.RUNNING


def test_a_guest_reset_during_the_end_does_not_boot_again(booted, engine):
    machine = engine.last_machine
    machine.guest.reset()
    booted.vmm.exit_evt.write()

    assert booted.vmm.join(DEADLINE_S)
    assert booted.names().count("vmm/shutdown") == 1
    assert booted.vmm.failure is None


def test_counters_under_way_are_answered_at_the_end(booted, engine):
    engine.faults.set("counters", Hang())
    counters = booted.beside(api.vm_counters)
    booted(api.vmm_ping)

    booted(api.vmm_shutdown)

    assert isinstance(counters.result(), api.VmInfoError | api.RequestSend)


def test_counters_of_a_vm_on_its_way_out_are_those_of_none(booted, engine, monkeypatch):
    machine, is_killed, is_asked = engine.last_machine, threading.Event(), threading.Event()
    close = machine.close

    def close_late() -> None:
        machine.kill()
        is_killed.set()
        assert is_asked.wait(DEADLINE_S)
        close()

    monkeypatch.setattr(machine, "close", close_late)
    shutdown = booted.beside(api.vm_shutdown)
    assert is_killed.wait(DEADLINE_S)

    with pytest.raises(api.VmInfoError) as caught:
        booted(api.vm_counters)
    is_asked.set()

    assert error_chain(caught.value)[-1] == "VM is not running"
    assert shutdown.result() is None


def test_changes_are_carried_out_in_order_of_arrival(caller, vm_config, engine):
    caller(api.vm_create, vm_config)
    calls = [caller.beside(api.vm_boot)]
    caller.wait_for_event("vm/booting")
    for function in (api.vm_pause, api.vm_resume, api.vm_shutdown, api.vm_boot):
        calls.append(caller.beside(function))
        calls[-1].result()

    assert [call.result() for call in calls] == [None] * 5
    assert caller.names() == [
        "vm/booting",
        "vm/booted",
        "vm/pausing",
        "vm/paused",
        "vm/resuming",
        "vm/resumed",
        "vm/shutdown",
        "vm/booting",
        "vm/booted",
    ]


def test_two_hundred_cycles_leave_nothing_behind(caller, vm_config):
    def traces() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    caller(api.vm_delete)
    before = traces()

    for _ in range(200):
        caller(api.vm_create, vm_config)
        caller(api.vm_boot)
        caller(api.vm_shutdown)
        caller(api.vm_delete)

    assert traces() == before


def test_ping_in_either_form_has_the_same_answer(caller):
    typed = caller(api.vmm_ping)
    reply = api.ReplyChannel()

    caller.vmm.api_sender.send(Ping(reply))
    caller.vmm.api_evt.write()

    assert reply.recv(timeout_s=DEADLINE_S).json == msgspec.json.encode(typed)


def test_a_signal_ends_a_vmm_that_can_get_no_thread(caller, monkeypatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    caller.vmm.exit_evt.write()

    assert caller.vmm.join(DEADLINE_S)
    assert caller.vmm.failure is None
    assert caller.refusal(api.vmm_ping) == ["API request send error"]


@pytest.mark.parametrize("kind", [OSError, ImportError])
def test_vmm_that_could_not_be_loaded_for_the_first_request_serves_the_next(monkeypatch, vm_config, kind):
    make = VmmThread._make_dispatch
    reasons = [kind("Too many open files")]

    def make_later(self, loop):
        if reasons:
            raise reasons.pop()
        return make(self, loop)

    monkeypatch.setattr(VmmThread, "_make_dispatch", make_later)
    caller = Caller(FakeEngine())
    assert "Too many open files" in caller.refusal(api.vm_create, vm_config)[-1]
    caller(api.vm_create, vm_config)
    caller.close()
