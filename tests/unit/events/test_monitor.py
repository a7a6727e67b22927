"""The event hub and the monitor file's form."""

from __future__ import annotations

import os

import msgspec

from cloudvmm.events.hub import EventHub
from cloudvmm.events.monitor import EventMonitor, render_event


def test_the_form_is_the_references():
    clock = iter([10, 1_250_000_010]).__next__
    seen = []
    hub = EventHub(clock)
    hub.subscribe(seen.append)

    hub.emit("vm", "booted")

    assert render_event(seen[0]) == (
        b'{\n  "timestamp": {\n    "secs": 1,\n    "nanos": 250000000\n  },\n'
        b'  "source": "vm",\n  "event": "booted",\n  "properties": null\n}\n\n'
    )


def test_properties_are_an_object_of_strings():
    seen = []
    hub = EventHub()
    hub.subscribe(seen.append)

    hub.emit("guest", "panic", {"event": "panic"})

    assert msgspec.json.decode(render_event(seen[0]))["properties"] == {"event": "panic"}


def test_the_file_is_truncated_private_and_gets_every_event(tmp_path):
    path = tmp_path / "events"
    path.write_text("old")
    path.unlink()
    monitor = EventMonitor.at_path(str(path))
    hub = EventHub()
    hub.subscribe(monitor)
    hub.emit("vmm", "starting")
    hub.emit("vmm", "shutdown")
    monitor.close()

    events = [msgspec.json.decode(part)["event"] for part in path.read_bytes().split(b"\n\n") if part]
    assert events == ["starting", "shutdown"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_pipe_nobody_reads_never_blocks_the_emitter():
    read_end, write_end = os.pipe()
    hub = EventHub()
    monitor = EventMonitor(write_end)
    hub.subscribe(monitor)

    for _ in range(2000):
        hub.emit("vm", "pausing")

    assert len(os.read(read_end, 1 << 20)) <= 1 << 16
    os.close(read_end)
    monitor.close()


def test_a_listener_that_raises_is_dropped_and_the_others_go_on():
    hub = EventHub()
    seen = []

    def broken(event) -> None:
        raise RuntimeError("no")

    hub.subscribe(broken)
    hub.subscribe(seen.append)
    hub.emit("vm", "booting")
    hub.emit("vm", "booted")

    assert [event.number for event in seen] == [0, 1]


def test_unsubscribing_ends_delivery():
    hub = EventHub()
    seen = []
    end = hub.subscribe(seen.append)
    hub.emit("vm", "booting")
    end()
    hub.emit("vm", "booted")

    assert [event.event for event in seen] == ["booting"]


def test_numbers_count_up_from_zero_whoever_listens():
    hub = EventHub()
    hub.emit("vm", "booting")
    seen = []
    hub.subscribe(seen.append)
    hub.emit("vm", "booted")

    assert seen[0].number == 1


def test_what_the_reference_does_not_know_is_not_written(tmp_path):
    hub = EventHub()
    monitor = EventMonitor.at_path(str(tmp_path / "events"))
    hub.subscribe(monitor)
    hub.emit("vm", "resize-progress", {"part": "ram"}, is_ours=True)
    hub.emit("vm", "resized")
    monitor.close()
    text = (tmp_path / "events").read_text()
    assert "resized" in text and "resize-progress" not in text
    assert [event.is_ours for event in hub.since(0, limit=9)] == [True, False]


def test_full_pipe_loses_whole_events_and_never_a_part_of_one():
    read_end, write_end = os.pipe()
    hub = EventHub()
    monitor = EventMonitor(write_end)
    hub.subscribe(monitor)
    for _ in range(2000):
        hub.emit("vm", "pausing")

    text = os.read(read_end, 1 << 20)
    hub.emit("vm", "paused")
    monitor.close()
    while piece := os.read(read_end, 1 << 20):
        text += piece
    os.close(read_end)

    events = [msgspec.json.decode(part)["event"] for part in text.split(b"\n\n") if part]
    assert set(events[:-1]) == {"pausing"}
    assert events[-1] == "paused"


def test_reader_of_a_pipe_that_left_disturbs_nobody():
    read_end, write_end = os.pipe()
    os.close(read_end)
    hub = EventHub()
    monitor = EventMonitor(write_end)
    hub.subscribe(monitor)
    seen = []
    hub.subscribe(seen.append)
    hub.emit("vm", "booted")
    monitor.close()

    assert [event.event for event in seen] == ["booted"]
