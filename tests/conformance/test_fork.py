"""A process that holds clones: who outlives whom, and what ends them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.deadline import HOST_S
from support.fork import CloneVm
from support.server import Server
from support.vm import choose_engine, small_config
from support.wait import wait_until


class Forked:
    """A server whose VM has two clones."""

    def __init__(self, folder: Path) -> None:
        engine = choose_engine("fake")
        self.server = Server(folder / "server", [*engine.flags])
        self.server.wait_ready()
        self.server.vmm.put("vm.create", small_config(engine, folder))
        self.server.vmm.put("vm.boot")
        clones = folder / "clones"
        clones.mkdir()
        told = self.server.vmm.put("vm.fork", {"directory": str(clones), "count": 2})
        self.clones = [CloneVm(each, has_shell=False) for each in told["clones"]]

    def has_ended(self) -> bool:
        return not self.server.is_running


@pytest.fixture
def forked(tmp_path: Path) -> Forked:
    return Forked(tmp_path)


def test_clones_outlive_the_vm_and_the_process_ends_with_the_last(forked: Forked) -> None:
    one, two = forked.clones
    forked.server.vmm.put("vmm.shutdown")
    one.end()
    assert two.config()["memory"]
    assert forked.server.is_running
    two.end()
    wait_until(forked.has_ended, "the process ends", timeout_s=HOST_S)
    forked.server.check_end()


@pytest.mark.parametrize("is_first_gone", [False, True])
def test_signal_ends_all(forked: Forked, is_first_gone: bool) -> None:
    if is_first_gone:
        forked.server.vmm.put("vmm.shutdown")
    for clone in forked.clones:
        clone.close()
    forked.server.terminate()
    wait_until(forked.has_ended, "the process ends", timeout_s=HOST_S)
    forked.server.check_end()
    assert not any(Path(clone.vmm.path).exists() for clone in forked.clones)
