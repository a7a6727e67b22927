"""kill -9 of a VMM that snapshots: the folder holds a whole snapshot, or the next attempt makes one there.

Real processes on the fake engine; the blow falls at a seeded moment.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path

import pytest

from support.attack import Call
from support.server import Server

WHOLE = ["config.json", "engine-state.json", "state.json"]
LAST_MOMENT_S = 0.012
SOON_S = 20.0


class Rounds:
    """VMMs that snapshot into `folder` and are killed, one after the other."""

    def __init__(self, home: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder = home / "snapshot"
        self.folder.mkdir()
        self.outcomes: set[str] = set()
        self._home = home
        self._kernel = home / "kernel"
        self._kernel.write_bytes(b"kernel")
        self._count = 0

    def strike(self) -> None:
        server = self._paused()
        call = Call(server.socket_path, "PUT", "vm.snapshot", self._body())
        threading.Event().wait(self.random.uniform(0, LAST_MOMENT_S))
        server.kill()
        call.outcome(timeout_s=SOON_S)
        server.check_end()
        survivor = self._new()
        if (self.folder / "state.json").exists():
            self.outcomes.add("whole")
            survivor.vmm.put("vm.restore", {"source_url": f"file://{self.folder}", "resume": True})
            assert survivor.vmm.get("vm.info")["state"] == "Running"
            survivor.vmm.put("vm.pause")
            assert "File exists" in survivor.vmm.put("vm.snapshot", self._body(), expect=500)[-1]
        else:
            self.outcomes.add("cut short" if os.listdir(self.folder) else "not begun")
            self._boot(survivor)
            survivor.vmm.put("vm.snapshot", self._body())
        assert sorted(os.listdir(self.folder)) == WHOLE
        survivor.check_end()
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def _body(self) -> dict[str, str]:
        return {"destination_url": f"file://{self.folder}"}

    def _paused(self) -> Server:
        server = self._new()
        self._boot(server)
        return server

    def _boot(self, server: Server) -> None:
        server.vmm.put("vm.create", {"payload": {"kernel": str(self._kernel)}, "console": {"mode": "Off"}})
        server.vmm.put("vm.boot")
        server.vmm.put("vm.pause")

    def _new(self) -> Server:
        self._count += 1
        server = Server(self._home / f"vmm{self._count}", ["--engine", "fake"])
        server.wait_ready()
        return server


@pytest.mark.parametrize("count", [8, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_snapshot_of_a_killed_vmm_is_whole_or_made_by_the_next(tmp_path, count):
    rounds = Rounds(tmp_path, count)
    for _ in range(count):
        rounds.strike()
    assert "whole" in rounds.outcomes or "cut short" in rounds.outcomes
