"""The hub's log, from which streams are read."""

from cloudvmm.events.hub import KEPT_EVENTS, EventHub
from cloudvmm.events.monitor import log_text


def numbers(hub, number, limit=1000):
    return [event.number for event in hub.since(number, limit=limit)]


def filled(count, *, kept=KEPT_EVENTS):
    hub = EventHub(kept=kept)
    for _ in range(count):
        hub.emit("vm", "pausing")
    return hub


def test_empty_log_gives_nothing():
    hub = EventHub()
    assert (hub.first_kept, hub.next_number, numbers(hub, 0)) == (0, 0, [])


def test_events_from_a_number_on_are_given_up_to_the_limit():
    assert numbers(filled(10), 3, limit=4) == [3, 4, 5, 6]


def test_number_that_has_not_come_gives_nothing():
    assert numbers(filled(3), 3) == numbers(filled(3), 99) == []


def test_oldest_events_go_when_the_log_is_full():
    hub = filled(25, kept=10)
    assert (hub.first_kept, hub.next_number) == (15, 25)
    assert numbers(hub, 0) == numbers(hub, 15) == list(range(15, 25))


def test_log_keeps_4096_events():
    hub = filled(KEPT_EVENTS + 1)
    assert (KEPT_EVENTS, hub.first_kept) == (4096, 1)


def test_event_is_in_the_log_before_listeners_hear_of_it():
    hub = EventHub()
    found = []
    hub.subscribe(lambda event: found.append(numbers(hub, event.number)))
    hub.emit("vm", "booting")
    assert found == [[0]]


def test_log_text_is_the_reference_s():
    hub = EventHub()
    hub.emit("vm", "booted")
    hub.emit("vm", "device-removed", {"id": "d0", "bdf": "0000:00:05.0"})
    assert [log_text(event) for event in hub.since(0, limit=2)] == [
        "Event: source = vm event = booted ",
        "Event: source = vm event = device-removed id = d0, bdf = 0000:00:05.0",
    ]
