"""Events whose numbers go on when another hub reads the file of the last one."""

from __future__ import annotations

from cloudvmm.events import log
from cloudvmm.events.hub import EventHub


def told(hub):
    return [(event.number, event.event) for event in hub.since(0, limit=100)]


def test_numbers_go_on_in_the_next_hub_behind_what_it_emitted_before(tmp_path):
    path = str(tmp_path / "events")
    first = EventHub()
    first.keep(path)
    first.emit("vm", "booting")
    first.emit("vm", "booted")
    second = EventHub()
    second.emit("vmm", "starting")
    second.keep(path)
    second.emit("vmm", "adopted")

    assert told(second) == [(0, "booting"), (1, "booted"), (2, "starting"), (3, "adopted")]
    times = [event.monotonic_ns for event in second.since(0, limit=100)]
    assert times == sorted(times)


def test_half_a_line_of_a_vmm_that_was_killed_is_passed_over(tmp_path):
    path = tmp_path / "events"
    first = EventHub()
    first.keep(str(path))
    first.emit("vm", "booting")
    with path.open("ab") as file:
        file.write(b'{"number":1,"mono')
    second = EventHub()
    second.keep(str(path))
    second.emit("vm", "booted")

    assert told(second) == [(0, "booting"), (1, "booted")]


def test_file_stays_short_and_numbers_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "MOST_BYTES", 2000)
    path = tmp_path / "events"
    first = EventHub()
    first.keep(str(path))
    for _ in range(100):
        first.emit("vm", "resized")
    second = EventHub()
    second.keep(str(path))

    assert path.stat().st_size <= 2000
    assert second.next_number == 100
