"""Which slots a guest may still eject devices from, by what it was told and when."""

import msgspec
import pytest

from cloudvmm.engine.qemu.ejection import Ejections

SLOT = 5
OTHER = 6


@pytest.fixture
def ejections():
    return Ejections()


def leave_in_a_hurry(ejections, device_id, slot):
    ejections.ask(device_id)
    ejections.ask(device_id)
    ejections.leave(device_id, slot)


def test_slot_of_a_device_that_went_undisturbed_is_settled(ejections):
    ejections.plug("a")
    ejections.note_seen("a")
    ejections.ask("a")
    ejections.leave("a", SLOT)
    assert not ejections.unsettled


@pytest.mark.parametrize("disturb", [Ejections.plug, Ejections.ask])
def test_slot_is_unsettled_where_another_came_or_was_to_go_meanwhile(ejections, disturb):
    ejections.ask("a")
    disturb(ejections, "b")
    ejections.leave("a", SLOT)
    assert set(ejections.unsettled) == {SLOT}


@pytest.mark.parametrize("disturb", [Ejections.plug, Ejections.ask])
def test_slot_is_unsettled_where_the_guest_may_not_have_heard_of_another_yet(ejections, disturb):
    disturb(ejections, "b")
    ejections.ask("a")
    ejections.leave("a", SLOT)
    assert set(ejections.unsettled) == {SLOT}


def test_slot_is_unsettled_where_its_device_was_asked_for_twice(ejections):
    assert ejections.ask("a")
    assert not ejections.ask("a")
    ejections.leave("a", SLOT)
    assert set(ejections.unsettled) == {SLOT}


def test_slot_is_unsettled_where_the_guest_had_not_taken_the_device_up(ejections):
    ejections.plug("a")
    ejections.ask("a")
    ejections.leave("a", SLOT)
    assert set(ejections.unsettled) == {SLOT}


def test_what_was_asked_for_later_settles_a_slot(ejections):
    leave_in_a_hurry(ejections, "a", SLOT)
    ejections.ask("b")
    ejections.leave("b", OTHER)
    assert not ejections.unsettled


def test_what_was_asked_for_before_settles_no_slot(ejections):
    ejections.ask("b")
    leave_in_a_hurry(ejections, "a", SLOT)
    ejections.leave("b", OTHER)
    assert set(ejections.unsettled) == {SLOT, OTHER}


def test_device_that_the_guest_ejects_unasked_settles_nothing(ejections):
    leave_in_a_hurry(ejections, "a", SLOT)
    ejections.leave("b", OTHER)
    assert set(ejections.unsettled) == {SLOT}


def test_device_that_goes_from_an_unsettled_slot_settles_no_other(ejections):
    ejections.ask("a")
    ejections.ask("b")
    ejections.leave("a", SLOT)
    ejections.leave("b", OTHER)
    ejections.ask("c")
    ejections.leave("c", SLOT)
    assert set(ejections.unsettled) == {SLOT, OTHER}


def test_device_that_nobody_takes_up_is_no_news_behind_a_removal(ejections):
    ejections.plug("idle")
    ejections.ask("a")
    ejections.leave("a", SLOT)
    ejections.ask("b")
    ejections.leave("b", OTHER)
    assert not ejections.unsettled
    assert not ejections.unseen


def test_addition_that_failed_and_removal_that_was_refused_settle_nothing_and_leave_nothing(ejections):
    leave_in_a_hurry(ejections, "a", SLOT)
    ejections.plug("b")
    ejections.drop("b")
    ejections.ask("c")
    ejections.retract("c")
    assert set(ejections.unsettled) == {SLOT}
    assert not ejections.unseen
    assert not ejections.asked


def test_all_of_it_is_written_and_read(ejections):
    ejections.ask("a")
    ejections.plug("b")
    ejections.leave("a", SLOT)
    ejections.ask("b")
    assert msgspec.json.decode(msgspec.json.encode(ejections), type=Ejections) == ejections


def test_copy_goes_its_own_way(ejections):
    leave_in_a_hurry(ejections, "a", SLOT)
    copy = ejections.copy()
    assert copy == ejections
    ejections.ask("b")
    ejections.plug("c")
    ejections.leave("b", OTHER)
    assert copy == Ejections(turn=2, unsettled={SLOT: 2})
