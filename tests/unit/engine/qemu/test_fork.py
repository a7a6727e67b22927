"""What a fork takes back by itself where the host or QEMU refuses, in a played QEMU."""

from __future__ import annotations

import os

import pytest

from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.number import MIB
from cloudvmm.engine.base import EngineTimeout
from cloudvmm.engine.qemu import fork, twin
from cloudvmm.engine.qemu.debugger import DebugWatch
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.memory import RamBacking, rams_of
from cloudvmm.engine.qemu.qmp import QmpError
from cloudvmm.engine.qemu.resource import Resources
from cloudvmm.engine.qemu.snapshot import let_run
from support.leak import Holdings

DOWNTIME_MS = 5


class PlayedQemu:
    """Has a guest that runs, and answers the command `silent_at` too late.

    It refuses to let the guest run for as long as it has one of `states` left to say that it is in.
    """

    def __init__(self, silent_at=None, states=()):
        self.commands = []
        self._silent_at = silent_at
        self._states = list(states)

    def execute(self, command, arguments=None, *, timeout_s=None):
        self.commands.append(command)
        if command == self._silent_at:
            raise EngineTimeout(command)
        if command == "cont" and self._states:
            raise QmpError(command, "GenericError", "Migration is not finalized yet")
        status = self._states.pop(0) if self._states else "running"
        return {"running": True, "status": status, "downtime": DOWNTIME_MS}


class PlayedSaver:
    def __init__(self, memories=()):
        self.has_run = False
        self._memories = memories

    def check_blockers(self):
        """There are none."""

    def memories_apart(self):
        return self._memories

    def note_run(self):
        self.has_run = True


def test_guest_that_stands_still_too_late_is_let_run():
    qemu, saver = PlayedQemu(silent_at="stop"), PlayedSaver()
    with pytest.raises(EngineTimeout), fork._standing_still(qemu, saver, DebugWatch()):
        pytest.fail("It does not stand still")
    assert qemu.commands == ["query-status", "stop", "cont"]
    assert saver.has_run


def test_guest_runs_as_soon_as_its_state_is_given():
    qemu = PlayedQemu(states=["finish-migrate"] * 2)
    let_run(qemu)
    assert qemu.commands == ["cont", "query-status"] * 2 + ["cont"]


def test_guest_that_may_not_run_is_not_waited_for():
    qemu = PlayedQemu(states=["guest-panicked"])
    with pytest.raises(QmpError, match="not finalized"):
        let_run(qemu)
    assert qemu.commands == ["cont", "query-status"]


def test_guest_whose_memory_qemu_gives_runs_on_until_qemu_stops_it():
    qemu, saver = PlayedQemu(), PlayedSaver()
    with fork._standing_still(qemu, saver, DebugWatch(), is_late=True) as stand:
        stand.look(lambda: None)
        stand.note_written()
        assert "stop" not in qemu.commands
    assert qemu.commands == ["query-status", "query-migrate", "cont"]
    assert stand.length_s >= DOWNTIME_MS / 1000
    assert saver.has_run


def test_guest_that_writes_faster_than_qemu_is_stopped_once(monkeypatch):
    monkeypatch.setattr(fork, "_PATIENCE_S", -1.0)
    qemu = PlayedQemu()
    with fork._standing_still(qemu, PlayedSaver(), DebugWatch(), is_late=True) as stand:
        stand.look(lambda: None)
        stand.look(lambda: None)
    assert qemu.commands == ["query-status", "stop", "cont"]


def test_neither_end_of_standing_still_is_a_debuggers():
    watch = DebugWatch()
    watch.want(is_to_run=True)
    with fork._standing_still(PlayedQemu(), PlayedSaver(), watch):
        assert watch.judge_stop("paused", watch.turn) == []
    assert watch.hear_resume() == []


def test_host_with_too_little_memory_is_told_before_anything_is_touched(monkeypatch):
    memory = RamBacking(device_id="ram0", ram=rams_of(MemoryConfig(size=8 * MIB))[0])
    memory.open()
    os.pwrite(memory.fd, bytes(3 * MIB), 0)
    qemu, saver = PlayedQemu(), PlayedSaver({"ram0": memory})
    machine = {"control": qemu, "saver": saver, "resources": Resources(memory=None), "hotplug": None}
    monkeypatch.setattr(fork, "free_memory", lambda group: 2 * MIB + 5)
    with pytest.raises(fork.TooLittleMemory, match="takes 3 MiB, and the host has 2 MiB to give"):
        fork.fork_guest(
            {}, {}, **machine, facts=QemuFacts(binary="/qemu", version=(10, 0, 2)), debugger=DebugWatch(),
            check=lambda: None,
        )  # fmt: skip
    assert qemu.commands == []
    memory.close()


def test_memory_that_qemu_alone_knows_is_reckoned_as_a_whole(monkeypatch):
    memory = RamBacking(device_id="ram0", ram=rams_of(MemoryConfig(size=8 * MIB))[0])
    memory.stand_on(os.memfd_create("base", os.MFD_CLOEXEC))
    monkeypatch.setattr(fork, "free_memory", lambda group: 7 * MIB)
    with pytest.raises(fork.TooLittleMemory, match="takes 8 MiB"):
        fork._check_room({"ram0": memory})
    memory.close()


@pytest.mark.parametrize("free", [3 * MIB, None])
def test_memory_that_is_there_or_unknown_is_taken(monkeypatch, free):
    memory = RamBacking(device_id="ram0", ram=rams_of(MemoryConfig(size=8 * MIB))[0])
    memory.open()
    os.pwrite(memory.fd, bytes(3 * MIB), 0)
    monkeypatch.setattr(fork, "free_memory", lambda group: free)
    fork._check_room({"ram0": memory})
    memory.close()


@pytest.mark.parametrize("sealed", [0, 1])
def test_files_that_the_kernel_does_not_seal_are_not_lost(monkeypatch, sealed):
    def refuse(fd):
        raise OSError("busy")

    before = Holdings()
    memory = RamBacking(device_id="ram0", ram=rams_of(MemoryConfig(size=MIB))[0])
    memory.open()
    files = fork._Files()
    files.take({"ram0": memory}, lambda: None)
    with files.made("engine-state"):
        pass
    monkeypatch.setattr((fork, twin)[sealed], "seal", refuse)
    with pytest.raises(fork.MemoryNotTaken):
        files.seal()
    files.close()
    memory.close()
    before.assert_nothing_added()
