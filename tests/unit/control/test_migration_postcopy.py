"""memory_mode Postcopy between two VMMs on the fake engine, whose memory follows as faults will."""

from __future__ import annotations

import pytest

import cloudvmm.control.receive
import cloudvmm.control.send
from cloudvmm import api
from cloudvmm.api import MigrationPhase
from cloudvmm.config.operation import MigrationMemoryMode
from cloudvmm.engine.base import EngineError, LinkLost
from cloudvmm.engine.fake import Delay, Die, Fail
from cloudvmm.engine.fake.phase import Phase
from cloudvmm.migration.message import Complete, Done, Ready
from support.wait import wait_until

from .conftest import DEADLINE_S, Caller
from .peer import Peer
from .test_migration import is_running, receive, refusal_of, send

POSTCOPY = MigrationMemoryMode.POSTCOPY


@pytest.fixture
def listening(other, url):
    """The other VMM, which waits for a VM."""
    other.answer = other.beside(api.vm_receive_migration, receive(url, memory_mode=POSTCOPY))
    other.wait_for_event("vm/migration-receive-ready")
    return other


def wait_for_phase(caller: Caller, phase: MigrationPhase) -> None:
    wait_until(
        lambda: caller(api.vm_migration_progress).phase is phase, f"the phase {phase}", timeout_s=DEADLINE_S
    )


def test_guest_runs_there_and_the_source_ends_when_it_has_all(booted, listening, url):
    booted(api.vm_send_migration, send(url, memory_mode=POSTCOPY))

    assert listening.answer.result() is None
    assert is_running(listening)
    wait_until(lambda: not booted.vmm.is_running, "the end of the source", timeout_s=DEADLINE_S)
    names = booted.names()
    assert names.index("vm/postcopy-migration-completed") + 1 == names.index("vm/migration-finished")


def test_guest_runs_there_while_its_memory_follows_and_nothing_calls_it_off(booted, listening, url):
    for side in (booted, listening):
        side.engine.faults.set("transfer_rest", Delay(5.0))  # longer than a host stands still
    booted(api.vm_send_migration, send(url, memory_mode=POSTCOPY))

    for side in (booted, listening):
        wait_for_phase(side, MigrationPhase.POSTCOPY)
        words = side.refusal(api.vm_cancel_migration)
        assert words[-1].endswith("so the migration cannot be cancelled any more")
    assert is_running(listening)
    assert not is_running(booted)
    assert listening.answer.result() is None


def test_lost_connection_is_made_anew(booted, listening, url):
    for side in (booted, listening):
        side.engine.faults.set("transfer_rest", Fail(LinkLost, "Cut"), times=2)

    booted(api.vm_send_migration, send(url, memory_mode=POSTCOPY))

    assert listening.answer.result() is None
    wait_until(lambda: not booted.vmm.is_running, "the end of the source", timeout_s=DEADLINE_S)
    assert booted.vmm.failure is None


def test_machine_that_dies_while_its_memory_follows_is_not_resumed_at_the_source(booted, listening, url):
    listening.engine.faults.set("transfer_rest", Die())
    booted.engine.faults.set("transfer_rest", Fail(LinkLost, "Cut"))

    booted(api.vm_send_migration, send(url, memory_mode=POSTCOPY))

    assert isinstance(listening.answer.result(), api.ApiError)
    booted.wait_for_event("vm/migration-failed")
    wait_until(lambda: booted(api.vm_info).state is api.VmState.PAUSED, "it is back", timeout_s=DEADLINE_S)
    assert any("must not be resumed" in text for text in booted.logged)
    assert booted.refusal(api.vm_resume)[-1] == "The guest has gone on in another machine"
    booted(api.vm_delete)


def test_guest_that_lacks_memory_stays_where_it_is(booted, listening, url, monkeypatch):
    monkeypatch.setattr(cloudvmm.control.receive, "RECONNECT_S", 0.1)
    monkeypatch.setattr(cloudvmm.control.send, "RECONNECT_S", 0.1)
    listening.engine.faults.set("transfer_rest", Fail(LinkLost, "Cut"))
    booted.engine.faults.set("transfer_rest", Fail(EngineError, "Broken"))

    booted(api.vm_send_migration, send(url, memory_mode=POSTCOPY))

    words = refusal_of(listening.answer.result())
    assert "must not be resumed" in " ".join(words)
    assert listening.engine.last_machine.phase is Phase.RUNNING
    assert listening.names()[-1] == "vm/migration-receive-failed"
    listening(api.vm_delete)


def test_connection_that_is_lost_again_and_again_is_given_up(booted, listening, url, monkeypatch):
    for module in (cloudvmm.control.send, cloudvmm.control.receive):
        monkeypatch.setattr(module, "RECONNECT_S", 5.0)  # longer than a host stands still
    for side in (booted, listening):
        side.engine.faults.set("transfer_rest", Fail(LinkLost, "Cut"), times=1000)

    booted(api.vm_send_migration, send(url, memory_mode=POSTCOPY))

    words = refusal_of(listening.answer.result())
    booted.wait_for_event("vm/migration-failed")
    assert "must not be resumed" in " ".join(words)
    told = [text for text in booted.logged if "The migration failed" in text]
    assert any("again and again" in text for text in [*told, *words])
    assert booted.refusal(api.vm_resume)[-1] == "The guest has gone on in another machine"
    assert listening.engine.last_machine.phase is Phase.RUNNING
    for side in (booted, listening):
        side(api.vm_delete)


def lose_answer(booted: Caller, peer: Peer, url: str) -> None:
    """Take the VM, and break the connections before saying so."""
    peer.listen()
    booted(api.vm_send_migration, send(url, memory_mode=POSTCOPY))
    peer.accept(is_postcopy=True)
    peer.take_state()
    peer.control.send(Ready())
    peer.control.receive(Complete)
    for link in (peer.control, *peer.states):
        link.close()


def test_answer_that_is_lost_is_given_again(booted, peer, url):
    lose_answer(booted, peer, url)

    (link,) = peer.listener.accept_states("t", None, 1)
    assert booted(api.vm_migration_progress).phase is MigrationPhase.COMPLETING
    link.send(Done())

    wait_until(lambda: not booted.vmm.is_running, "the end of the source", timeout_s=DEADLINE_S)
    link.close()
    assert booted.names()[-3:] == ["vm/migration-finished", "vm/deleted", "vmm/shutdown"]


def test_answer_that_stays_lost_leaves_the_vm_paused(booted, peer, url, monkeypatch):
    monkeypatch.setattr(cloudvmm.control.send, "RECONNECT_S", 0.5)
    lose_answer(booted, peer, url)
    peer.listener.close()

    booted.wait_for_event("vm/migration-failed")
    wait_until(lambda: booted(api.vm_info).state is api.VmState.PAUSED, "it is back", timeout_s=DEADLINE_S)
    assert any("call vm.resume" in text for text in booted.logged)
    booted(api.vm_resume)
    assert is_running(booted)


def test_receiver_that_was_told_of_another_mode_refuses(booted, other, url):
    answer = other.beside(api.vm_receive_migration, receive(url))
    other.wait_for_event("vm/migration-receive-ready")

    booted(api.vm_send_migration, send(url, memory_mode=POSTCOPY))

    assert refusal_of(answer.result())[-1].startswith("The sender migrates with memory_mode Postcopy")
    booted.wait_for_event("vm/migration-failed")
    assert is_running(booted)


def test_receiver_takes_a_sender_that_sends_all_first(booted, listening, url):
    booted(api.vm_send_migration, send(url))

    assert listening.answer.result() is None
    assert is_running(listening)


def test_release_that_knows_nothing_of_it_is_told_from_its_answer(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url, memory_mode=POSTCOPY))

    assert peer.accept().is_postcopy

    booted.wait_for_event("vm/migration-failed")
    assert any("does not know memory_mode Postcopy" in text for text in booted.logged)
    assert is_running(booted)
