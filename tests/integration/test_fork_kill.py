"""kill -9 of the server, of the VM's QEMU, of both and of a clone's while a fork is made, at seeded moments.

The image that the VM had stays as it is, nothing is left running, and whoever lives goes on: a fork that
fails although its server lives leaves no clone, and a VM that lives in the image that it had.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from support.attack import Call, bare_config, spend
from support.booted import MIB, make_image
from support.deadline import GUEST_S
from support.fork import CloneVm
from support.process import ProcessId
from support.server import Server
from support.vm import EngineChoice, choose_engine
from support.wait import wait_until

pytestmark = pytest.mark.qemu

LAST_MOMENT_S = 0.8
VICTIMS = ("server", "the VM", "a clone", "both")
CLONES = 2


class Rounds:
    """A VM is booted, forked and struck, again and again."""

    def __init__(self, home: Path, engine: EngineChoice, seed: int) -> None:
        self.random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.forks = home / "forks"
        self._home = home
        self._engine = engine
        self._count = 0
        self._image = make_image(home / "disk.raw", MIB)
        self._image.write_bytes(bytes(range(256)) * (MIB // 256))
        self._digest = hashlib.sha1(self._image.read_bytes()).digest()
        self._server = self._new()

    def strike(self, victim: str) -> None:
        self.forks.mkdir()
        self._boot()
        (parent,) = self._qemus()
        body = {"directory": str(self.forks), "count": CLONES}
        call = Call(self._server.socket_path, "PUT", "vm.fork", body)
        spend(
            self.random.uniform(0, LAST_MOMENT_S),
            unless=lambda: call.is_over and self.random.random() < 0.01,
        )
        self._kill(victim, parent)
        reply = call.outcome(timeout_s=GUEST_S)
        status = None if reply is None else reply.status
        self.outcomes[f"{victim}: {status}"] += 1
        if victim in ("server", "both"):
            self._server.check_end()
            self._server = self._new()
        else:
            assert status in (200, 500)
            self._look(victim, [] if status == 500 else msgspec.json.decode(reply.body)["clones"])
        assert hashlib.sha1(self._image.read_bytes()).digest() == self._digest
        shutil.rmtree(self.forks)

    def close(self) -> None:
        self._server.check_end()

    def _look(self, victim: str, clones: list[dict[str, str]]) -> None:
        """Whoever was not struck is there, and all of them end as they are asked to."""
        vmm = self._server.vmm
        if not clones:
            assert not [path for path in self.forks.iterdir() if path.is_dir()]
            if victim == "a clone":
                info = vmm.get("vm.info")
                assert info["state"] == "Running"
                assert info["config"]["disks"][0]["path"] == str(self._image)
                assert list(self.forks.iterdir()) == []
        for told in clones:
            CloneVm(told, has_shell=False).end()
        vmm.exchange("PUT", "vm.delete")
        vmm.get("vm.info", expect=404)
        wait_until(lambda: not self._qemus(), "no QEMU is left", timeout_s=GUEST_S)

    def _kill(self, victim: str, parent: ProcessId) -> None:
        match victim:
            case "server":
                self._server.kill()
            case "the VM":
                parent.kill()
            case "both":
                self._server.kill(after=parent)
            case _:
                for qemu in self._qemus() - {parent}:
                    qemu.kill()
                    return

    def _boot(self) -> None:
        config = bare_config(self._engine, self._home)
        config["disks"] = [{"id": "disk", "path": str(self._image), "image_type": "Raw"}]
        self._server.vmm.put("vm.create", config)
        self._server.vmm.put("vm.boot", expect=204)

    def _qemus(self) -> set[ProcessId]:
        return {child for child in self._server.children() if "qemu-system" in child.command}

    def _new(self) -> Server:
        self._count += 1
        server = Server(self._home / f"server{self._count}", [*self._engine.flags, "--no-shutdown"])
        server.wait_ready()
        return server


def strike_all(home: Path, rounds: int, seed: int) -> Rounds:
    struck = Rounds(home, choose_engine("qemu"), seed)
    for number in range(rounds):
        struck.strike(VICTIMS[number % len(VICTIMS)])
    struck.close()
    return struck


def test_whoever_is_killed_nothing_is_left(tmp_path: Path) -> None:
    strike_all(tmp_path, 8, seed=1)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_whoever_is_killed_at_many_moments_nothing_is_left(tmp_path: Path) -> None:
    outcomes = strike_all(tmp_path, 200, seed=2).outcomes
    print(dict(outcomes))
    assert outcomes.keys() >= {"the VM: 500", "a clone: 500", "a clone: 200"}
