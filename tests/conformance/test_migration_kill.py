"""kill -9 of a migrating VMM: no VM is lost, none runs twice, and who is left is as good as new.

Real processes on the fake engine. The blow falls at a seeded moment of the migration; whoever survives is
asked what it holds, and takes part in the next round.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from support.attack import Call
from support.server import Server
from support.traveller import is_settled
from support.wait import wait_until

SOON_S = 20.0
LAST_MOMENT_S = 0.02


class Side:
    """A VMM of its own, with a file that tells its events."""

    def __init__(self, folder: Path, kernel: Path) -> None:
        self._events = folder.with_name(f"{folder.name}.events")
        self._kernel = kernel
        flags = ["--engine", "fake", "--event-monitor", f"path={self._events}"]
        self.server = Server(folder, flags)
        self.server.wait_ready()
        self.vmm = self.server.vmm
        self.held_at_rest = self._held()

    def boot(self) -> None:
        self.vmm.put("vm.create", {"payload": {"kernel": str(self._kernel)}, "console": {"mode": "Off"}})
        self.vmm.put("vm.boot")

    def events(self) -> list[str]:
        return [event["event"] for event in _json_values(self._events.read_text())]

    @property
    def state(self) -> str | None:
        """The VM's, None where there is nothing."""
        reply = self.vmm.exchange("GET", "vm.info")
        return msgspec.json.decode(reply.body)["state"] if reply.status == 200 else None

    def kill(self) -> None:
        self.server.kill()

    def check_holds_no_more(self, at_most: int) -> None:
        """Fail if descriptors or threads were left over from what is settled."""
        what = f"the server holds {at_most} descriptors and threads again"
        wait_until(lambda: self._held() <= at_most, what, timeout_s=SOON_S)

    def _held(self) -> int:
        proc = Path(f"/proc/{self.server.pid}")
        return len(os.listdir(proc / "fd")) + len(os.listdir(proc / "task"))


def _json_values(text: str) -> list[dict]:
    return [msgspec.json.decode(part) for part in text.split("\n\n") if part]


class Rounds:
    """Two sides that migrate and are struck, again and again."""

    def __init__(self, folder: Path, seed: int, kind: str) -> None:
        self.random = random.Random(seed)
        self._folder = folder
        self._kind = kind
        self._kernel = folder / "kernel"
        self._kernel.write_bytes(b"kernel")
        self._numbers = itertools.count()
        self._sides: list[Side] = []
        self.source = self._new_source()
        self.destination = self._new()

    def strike(self, victims: str, after_s: float) -> str:
        """Migrate, kill `victims` once `after_s` have passed, and return what became of the VM."""
        was = self.source.state
        assert was in ("Running", "Paused")
        url = self._url()
        ready = self.destination.events().count("migration-receive-ready")
        answer = Call(
            self.destination.server.socket_path, "PUT", "vm.receive-migration", {"receiver_url": url}
        )
        wait_until(
            lambda: self.destination.events().count("migration-receive-ready") > ready,
            "the destination listens",
            timeout_s=SOON_S,
        )
        self.source.vmm.put("vm.send-migration", {"destination_url": url})
        threading.Event().wait(after_s)  # the moment itself is what is tested
        if victims in ("source", "both"):
            self.source.kill()
        if victims in ("destination", "both"):
            self.destination.kill()
        without = {"source": self._without_source, "destination": self._without_destination}
        return without.get(victims, self._without_any)(answer, was)

    def _without_source(self, answer: Call, was: str) -> str:
        source, destination = self.source, self.destination
        reply = answer.outcome(timeout_s=SOON_S)
        assert reply is not None, destination.server.stderr
        if reply.status == 204:
            assert destination.state == was
            self.source, self.destination = destination, self._new()
            outcome = "moved"
        else:
            assert destination.state is None
            assert not list(self._folder.glob("*.migration"))
            destination.check_holds_no_more(destination.held_at_rest)
            self.source = self._new_source()
            outcome = "killed with its VMM"
        self._retire(source)
        return outcome

    def _without_destination(self, answer: Call, was: str) -> str:
        source, destination = self.source, self.destination
        wait_until(lambda: is_settled(source.server), "the source is settled", timeout_s=SOON_S)
        answer.outcome(timeout_s=SOON_S)
        if not source.server.is_running:
            assert source.server.wait_end() == 0, source.server.stderr
            assert "migration-finished" in source.events()
            assert ("resumed" if was == "Running" else "restored") in destination.events()
            self._retire(source)
            self.source = self._new_source()
            outcome = "moved and killed with its VMM"
        elif source.state == was:
            outcome = "back as it was"
        else:
            assert source.state == "Paused"
            assert "then call vm.resume" in source.server.stderr
            source.vmm.put("vm.resume")
            outcome = "back paused, with a word"
        self._retire(destination)
        self.destination = self._new()
        return outcome

    def _without_any(self, answer: Call, was: str) -> str:
        answer.outcome(timeout_s=SOON_S)
        for side in (self.source, self.destination):
            self._retire(side)
        self.source, self.destination = self._new_source(), self._new()
        return "both killed"

    def close(self) -> None:
        for side in list(self._sides):
            self._retire(side)

    def _retire(self, side: Side) -> None:
        self._sides.remove(side)
        if not side.server.is_running and side.server.expected_status < 0:
            side.server.expected_status = side.server.wait_end()  # it may have ended before the blow fell
        side.server.check_end()
        for path in self._folder.glob("*.migration"):
            path.unlink()  # whoever is killed cannot remove its socket

    def _new_source(self) -> Side:
        side = self._new()
        side.boot()
        if self.random.random() < 0.3:
            side.vmm.put("vm.pause")
        return side

    def _new(self) -> Side:
        side = Side(self._folder / f"vmm{next(self._numbers)}", self._kernel)
        self._sides.append(side)
        return side

    def _url(self) -> str:
        if self._kind == "unix":
            return f"unix:{self._folder}/{next(self._numbers)}.migration"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return f"tcp:127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def rounds_of(tmp_path) -> Iterator:
    made: list[Rounds] = []

    def make(seed: int, kind: str) -> Rounds:
        made.append(Rounds(tmp_path, seed, kind))
        return made[-1]

    yield make
    for rounds in made:
        rounds.close()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("count", [8, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_vm_survives_the_end_of_the_other_vmm(rounds_of, kind, count):
    rounds, seen = rounds_of(count, kind), set()
    for number in range(count):
        victims = ("source", "destination", "both")[number % 8 % 3]  # seldom both
        seen.add(rounds.strike(victims, rounds.random.uniform(0, LAST_MOMENT_S)))
    assert len(seen) > 1
