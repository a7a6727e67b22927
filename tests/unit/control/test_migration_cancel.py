"""vm.migration-progress and vm.cancel-migration, on both sides of a migration between two VMMs."""

from __future__ import annotations

import pytest

from cloudvmm import api
from cloudvmm.api import MigrationPhase, MigrationRole
from cloudvmm.engine.base import EngineError
from cloudvmm.engine.fake import Delay, Fail, FakeEngine
from cloudvmm.migration.message import Complete, Done, Ready
from support.wait import wait_until

from .conftest import DEADLINE_S, Caller
from .peer import Peer
from .test_migration import is_running, receive, refusal_of, send


@pytest.fixture
def listening(url):
    """Another VMM, which waits for a VM."""
    caller = Caller(FakeEngine())
    caller.answer = caller.beside(api.vm_receive_migration, receive(url))
    caller.wait_for_event("vm/migration-receive-ready")
    yield caller
    caller.close()


@pytest.fixture
def peer(url):
    peer = Peer(url)
    yield peer
    peer.close()
    peer.cut.close()


def wait_for_phase(caller: Caller, phase: MigrationPhase) -> api.VmMigrationProgress:
    def progress():
        told = caller(api.vm_migration_progress)
        return told if told.phase is phase else None

    return wait_until(progress, f"the phase {phase}", timeout_s=DEADLINE_S)


def assert_runs_again(caller: Caller) -> None:
    caller.wait_for_event("vm/migration-failed")
    wait_until(lambda: is_running(caller), "the guest runs on", timeout_s=DEADLINE_S)
    assert wait_for_phase(caller, MigrationPhase.CANCELLED).role is MigrationRole.SENDER
    caller(api.vm_pause)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (api.vm_migration_progress, "Error looking at the migration"),
        (api.vm_cancel_migration, "Error cancelling the migration"),
    ],
)
def test_where_there_was_none_there_is_nothing_to_tell_or_cancel(booted, command, words):
    assert booted.refusal(command) == [words, "There is no migration"]


def test_both_sides_tell_how_it_ended(booted, listening, url, caplog):
    listening.engine.faults.set("resume", Delay(0.2))
    booted(api.vm_send_migration, send(url))
    assert listening.answer.result() is None

    told = listening(api.vm_migration_progress)
    assert (told.role, told.phase) == (MigrationRole.RECEIVER, MigrationPhase.FINISHED)
    assert told.transferred_bytes > 0
    assert 200 <= told.downtime_ms <= told.elapsed_ms


def test_source_tells_how_far_it_is(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()

    told = wait_for_phase(booted, MigrationPhase.LOADING)
    assert (told.role, told.iteration, told.remaining_bytes) == (MigrationRole.SENDER, 0, 0)
    assert told.transferred_bytes > 0
    assert told.downtime_ms is None


def test_paused_vm_has_no_downtime(booted, listening, url):
    booted(api.vm_pause)
    booted(api.vm_send_migration, send(url))
    assert listening.answer.result() is None
    assert listening(api.vm_migration_progress).downtime_ms is None


@pytest.mark.parametrize("moment", ["offer", "state", "ready"])
def test_source_calls_it_off_and_its_guest_runs_on(booted, peer, url, moment):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    if moment == "offer":
        peer.control = peer.listener.accept_sender()
    else:
        peer.accept()
    if moment == "ready":
        peer.take_state()
        wait_for_phase(booted, MigrationPhase.LOADING)

    booted(api.vm_cancel_migration)

    assert_runs_again(booted)
    assert booted.refusal(api.vm_cancel_migration)[-1] == "There is no migration"


def test_destination_hears_that_it_was_called_off(booted, listening, url):
    listening.engine.faults.set("build", Delay(5.0))  # longer than a host stands still
    booted(api.vm_send_migration, send(url))
    wait_for_phase(listening, MigrationPhase.RECEIVING)

    booted(api.vm_cancel_migration)

    assert_runs_again(booted)
    assert refusal_of(listening.answer.result())
    assert listening(api.vm_migration_progress).phase is MigrationPhase.FAILED
    assert listening.refusal(api.vm_info)[-1] == "VM is not created"


def test_what_was_called_off_can_be_tried_again(booted, listening, url):
    booted.engine.faults.set("send", Fail(EngineError), times=1)
    booted(api.vm_send_migration, send(url))
    assert refusal_of(listening.answer.result())
    wait_for_phase(booted, MigrationPhase.FAILED)
    answer = listening.beside(api.vm_receive_migration, receive(url))
    wait_for_phase(listening, MigrationPhase.LISTENING)
    booted(api.vm_send_migration, send(url))
    assert answer.result() is None


def test_receiver_that_waits_is_called_off(listening):
    assert listening(api.vm_migration_progress).phase is MigrationPhase.LISTENING

    listening(api.vm_cancel_migration)

    assert refusal_of(listening.answer.result()) == [
        "Error receiving migration",
        "Socket error",
        "The migration was told to end",
    ]
    assert listening(api.vm_migration_progress).phase is MigrationPhase.CANCELLED


def test_receiver_at_work_is_called_off_and_the_source_goes_on(booted, listening, url):
    listening.engine.faults.set("build", Delay(5.0))  # longer than a host stands still
    booted(api.vm_send_migration, send(url))
    wait_for_phase(listening, MigrationPhase.RECEIVING)

    listening(api.vm_cancel_migration)

    assert refusal_of(listening.answer.result())[-1]
    assert listening(api.vm_migration_progress).phase is MigrationPhase.CANCELLED
    booted.wait_for_event("vm/migration-failed")
    wait_until(lambda: is_running(booted), "the guest runs on", timeout_s=DEADLINE_S)
    assert booted(api.vm_migration_progress).phase is MigrationPhase.FAILED


def test_it_is_too_late_once_the_destination_was_told_to_go_on(booted, peer, url):
    peer.listen()
    booted(api.vm_send_migration, send(url))
    peer.accept()
    peer.take_state()
    peer.control.send(Ready())
    assert not peer.control.receive(Complete).is_paused

    assert booted.refusal(api.vm_cancel_migration) == [
        "Error cancelling the migration",
        "The destination was told to let the VM run, so the migration cannot be cancelled any more",
    ]
    peer.control.send(Done())
    booted.wait_for_event("vm/migration-finished")
