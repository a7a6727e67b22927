"""Does the fake guest see, do and say what its author wants?"""

from __future__ import annotations

import pytest

from cloudvmm.engine.base import EngineError, GuestPanicked, PoweredOff, ResetRequested
from cloudvmm.engine.fake import FakeEngine, PressSeen
from cloudvmm.engine.fake.console import MAX_PENDING_BYTES
from cloudvmm.engine.fake.phase import Phase
from support.deadline import HOST_S
from support.wait import is_readable, wait_until

READY = b"cloudvmm-guest ready uptime=0.00\n"


def test_presses_are_recorded_and_nothing_else_happens(running):
    running.power_button()
    running.nmi()
    running.nmi()
    assert running.guest.press_seen() == PressSeen(power_button=1, nmi=2)
    assert running.take_events() == []
    assert running.phase is Phase.RUNNING


def test_press_while_paused_is_seen_after_resume(running):
    running.pause()
    running.power_button()
    assert running.guest.press_seen().power_button == 0
    running.resume()
    assert running.guest.press_seen().power_button == 1


def test_guest_that_honours_the_power_button_switches_off(spec):
    machine = FakeEngine(guest_honours_power_button=True).build(spec)
    machine.boot()
    machine.power_button()
    assert machine.take_events()[-1] == PoweredOff()
    assert machine.phase is Phase.HALTED
    machine.close()


def test_panic_is_reported_and_the_guest_goes_on(running):
    running.guest.panic("crash_loaded")
    assert running.take_events() == [GuestPanicked("crash_loaded")]
    assert running.guest.is_awake


def test_reset_by_the_watchdog_is_told_apart(running):
    running.guest.reset(by_watchdog=True)
    assert running.take_events() == [ResetRequested(by_watchdog=True)]
    assert not running.guest.is_awake


@pytest.mark.parametrize("operation", ["pause", "kill", "close"])
def test_guest_that_does_not_run_can_do_nothing(running, operation):
    getattr(running, operation)()
    with pytest.raises(EngineError, match="does not run"):
        running.guest.power_off()


def test_operation_in_the_wrong_phase_is_refused(running):
    with pytest.raises(EngineError, match="running: resume"):
        running.resume()
    with pytest.raises(EngineError, match="running: boot"):
        running.boot()


def test_tick_grows_while_running_and_stands_still_while_paused(running):
    wait_until(lambda: running.guest.tick > 0, "a tick", timeout_s=HOST_S)
    running.pause()
    tick = running.guest.tick
    assert not is_readable(running.fileno(), timeout_s=0.05)
    assert running.guest.tick == tick
    running.resume()
    wait_until(lambda: running.guest.tick > tick, "a later tick", timeout_s=HOST_S)


def test_descriptor_is_readable_exactly_while_there_are_events(running):
    assert not is_readable(running.fileno(), timeout_s=0)
    running.guest.panic()
    running.guest.power_off()
    assert is_readable(running.fileno(), timeout_s=0)
    assert running.take_events() == [GuestPanicked("panic"), PoweredOff()]
    assert not is_readable(running.fileno(), timeout_s=0)


def test_file_gets_the_ready_line_appended(running, serial_file):
    assert serial_file.read_bytes() == b"before\n" + READY


def test_stream_gets_the_ready_line_and_its_own_lines_back(running, console_ends):
    ours, _ = console_ends
    assert ours.recv(4096) == READY
    ours.sendall(b"one\ntw")
    assert ours.recv(4096) == b"one\n"
    ours.sendall(b"o\n")
    assert ours.recv(4096) == b"two\n"


def test_stream_ends_when_the_machine_is_closed(running, console_ends):
    ours, theirs = console_ends
    assert ours.recv(4096) == READY
    theirs.close()
    running.close()
    assert ours.recv(4096) == b""


def test_peer_that_goes_away_harms_nothing(running, console_ends):
    ours, _ = console_ends
    ours.close()
    running.pause()
    running.resume()
    assert running.phase is Phase.RUNNING


def test_peer_that_does_not_read_loses_output_and_holds_up_nothing(running, console_ends):
    ours, _ = console_ends
    line = b"x" * 1000 + b"\n"
    for _ in range(3 * MAX_PENDING_BYTES // len(line)):
        ours.sendall(line)
    running.pause()
    assert running.phase is Phase.PAUSED


def test_lent_descriptor_keeps_its_flags(running, console_ends):
    _, theirs = console_ends
    assert theirs.getblocking()
