"""What a fork takes back by itself where the host or QEMU refuses, in a played QEMU."""

from __future__ import annotations

import pytest

from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.number import MIB
from cloudvmm.engine.base import EngineTimeout
from cloudvmm.engine.qemu import fork, twin
from cloudvmm.engine.qemu.debugger import DebugWatch
from cloudvmm.engine.qemu.memory import RamBacking, rams_of
from support.leak import Holdings


class PlayedQemu:
    """Has a guest that runs, and answers the command `silent_at` too late."""

    def __init__(self, silent_at=None):
        self.commands = []
        self._silent_at = silent_at

    def execute(self, command, arguments=None, *, timeout_s=None):
        self.commands.append(command)
        if command == self._silent_at:
            raise EngineTimeout(command)
        return {"running": True}


class PlayedSaver:
    def __init__(self):
        self.has_run = False

    def note_run(self):
        self.has_run = True


def test_guest_that_stands_still_too_late_is_let_run():
    qemu, saver = PlayedQemu(silent_at="stop"), PlayedSaver()
    with pytest.raises(EngineTimeout), fork._standing_still(qemu, saver, DebugWatch()):
        pytest.fail("It does not stand still")
    assert qemu.commands == ["query-status", "stop", "cont"]
    assert saver.has_run


def test_neither_end_of_standing_still_is_a_debuggers():
    watch = DebugWatch()
    watch.want(is_to_run=True)
    with fork._standing_still(PlayedQemu(), PlayedSaver(), watch):
        assert watch.judge_stop("paused", watch.turn) == []
    assert watch.hear_resume() == []


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
