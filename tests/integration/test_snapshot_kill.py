"""kill -9 of QEMU, of the server and of both while a guest is saved or restored, at seeded moments.

A snapshot is whole or not there, the one that is restored from stays as it is, nothing is left running, and
whoever lives goes on. `tests/conformance/test_snapshot_kill.py` has the same on the fake engine.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.snapshot.draft import DRAFT_FOLDER
from support.attack import Call, bare_config, find_qemu, spend
from support.booted import MIB, make_image
from support.deadline import GUEST_S
from support.server import Server
from support.vm import EngineChoice, choose_engine
from support.wait import wait_until

pytestmark = pytest.mark.qemu

LAST_MOMENT_S = 0.5
VICTIMS = ("server", "QEMU", "both")
DEEDS = ("snapshot", "snapshot of one on demand", "snapshot with its disk", "Copy", "OnDemand")


class Rounds:
    """VMs that go on from one snapshot, `base`, and are struck, one after the other."""

    def __init__(self, home: Path, engine: EngineChoice, seed: int) -> None:
        self.random = random.Random(seed)
        self.outcomes: set[str] = set()
        self.base = home / "base"
        self.target = home / "target"
        self.target.mkdir()
        self.images = home / "images"
        self.images.mkdir()
        self.disk = make_image(home / "disk", MIB)
        self.disk.write_bytes(os.urandom(MIB))
        self._home = home
        self._engine = engine
        self._count = 0
        self._server = self._new()
        self._make_base()
        self._digests = self._all_digests()

    def strike(self, deed: str, victim: str) -> None:
        if deed.startswith("snapshot"):
            self._restore("OnDemand" if "on demand" in deed else "Copy")
            body = {"destination_url": f"file://{self.target}"}
            if "disk" in deed:
                body["overlay_directory"] = str(self.images)
            call = self._call("vm.snapshot", body)
        else:
            call = self._call("vm.restore", self._request(deed))
        moment_s = self.random.uniform(0, LAST_MOMENT_S)
        spend(moment_s, unless=lambda: call.is_over and self.random.random() < 0.01)
        self._kill(victim)
        reply = call.outcome(timeout_s=GUEST_S)
        status = None if reply is None else reply.status
        self.outcomes.add(f"{deed}: {status}")
        if victim != "QEMU":
            self._server.check_end()
            self._server = self._new()
        else:
            assert status in (204, 500)
            self._expect_no_vm(was_there=deed.startswith("snapshot") or status == 204)
        if deed.startswith("snapshot"):
            self._judge_target(status)

    def close(self) -> None:
        """The server ends, and what was restored from is what it was."""
        self._server.check_end()
        assert self._all_digests() == self._digests

    def _judge_target(self, status: int | None) -> None:
        """It is whole, or the next attempt makes one there; both can be restored."""
        is_whole = (self.target / "state.json").exists()
        assert is_whole or status != 204
        if status is not None and not is_whole:
            assert (os.listdir(self.target), os.listdir(self.images)) == ([], [])
        if not is_whole:
            self._restore("Copy")
            self._server.vmm.put("vm.snapshot", {"destination_url": f"file://{self.target}"}, expect=204)
            self._server.vmm.put("vm.delete", expect=204)
        self.outcomes.add("whole" if is_whole else "none")
        draft = self.target / DRAFT_FOLDER
        if status is None and draft.exists():  # the blow fell when all was named, and it not yet gone
            assert set(os.listdir(draft)) <= {"naming", *os.listdir(self.target)}
            shutil.rmtree(draft)
        assert {name for name in os.listdir(self.target) if not name.startswith("engine-")} == {
            "config.json",
            "state.json",
        }
        self._restore("Copy", folder=self.target)
        self._server.vmm.put("vm.resume", expect=204)
        self._server.vmm.put("vm.delete", expect=204)
        for folder in (self.target, self.images):
            shutil.rmtree(folder)
            folder.mkdir()

    def _all_digests(self) -> dict[str, str]:
        return digests(self.base) | {"disk": hashlib.sha1(self.disk.read_bytes()).hexdigest()}

    def _make_base(self) -> None:
        self.base.mkdir()
        disks = [{"path": str(self.disk), "image_type": "Raw"}]
        self._server.vmm.put("vm.create", bare_config(self._engine, self._home, disks=disks))
        self._server.vmm.put("vm.boot", expect=204)
        self._server.vmm.put("vm.pause", expect=204)
        self._server.vmm.put("vm.snapshot", {"destination_url": f"file://{self.base}"}, expect=204)
        self._server.vmm.put("vm.delete", expect=204)

    def _request(self, mode: str, folder: Path | None = None) -> dict[str, Any]:
        return {
            "source_url": f"file://{folder or self.base}",
            "memory_restore_mode": mode,
            "overlay_directory": str(self.images),
        }

    def _restore(self, mode: str, folder: Path | None = None) -> None:
        self._server.vmm.put("vm.restore", self._request(mode, folder), expect=204)

    def _call(self, command: str, body: dict[str, Any]) -> Call:
        return Call(self._server.socket_path, "PUT", command, body)

    def _kill(self, victim: str) -> None:
        if victim == "server":
            self._server.kill()
            return
        qemu = find_qemu(self._server)
        if victim == "both":
            self._server.kill(after=qemu)
        elif qemu is not None:
            qemu.kill()

    def _expect_no_vm(self, *, was_there: bool) -> None:
        """A QEMU that was struck is gone, and what it ran with it; one that was not yet there was spared."""
        if was_there:
            wait_until(self._is_plain, "the server has seen the end of QEMU", timeout_s=GUEST_S)
        self._server.vmm.exchange("PUT", "vm.delete")
        self._server.vmm.get("vm.info", expect=404)
        wait_until(lambda: find_qemu(self._server) is None, "no QEMU is left", timeout_s=GUEST_S)

    def _is_plain(self) -> bool:
        return find_qemu(self._server) is not None or self._state() != "Paused"

    def _state(self) -> str:
        state: str = self._server.vmm.get("vm.info")["state"]
        return state

    def _new(self) -> Server:
        self._count += 1
        flags = [*self._engine.flags, "--no-shutdown"]
        server = Server(self._home / f"vmm{self._count}", flags)
        server.wait_ready()
        return server


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha1").hexdigest()
    return found


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_blow_at_any_moment_leaves_whole_snapshots_and_nothing_running(tmp_path: Path, count: int) -> None:
    rounds = Rounds(tmp_path, choose_engine("qemu"), count)
    try:
        for number in range(count):
            deed = DEEDS[number % len(DEEDS)]
            rounds.strike(deed, rounds.random.choice(VICTIMS))
    finally:
        rounds.close()
    assert rounds.outcomes & {"whole", "none"}
