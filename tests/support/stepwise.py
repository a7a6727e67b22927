"""A manager that dies at each step of a command, one after the other, and what the next one must make of it.

What `vm.info` says before the command and behind it is known from when nobody was killed. Behind a kill it
is one of the two, and the one that the next manager has told of; the machine is as `vm.info` says; and all
goes on from there. `mortal.py` dies.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec

from support.attack import Call, has_interface, spend, standing_config
from support.booted import make_image
from support.deadline import GUEST_S, HOST_S
from support.mortal import Plan
from support.process import ProcessId, identify
from support.rest import Reply
from support.server import Server, checked
from support.survivor import has_open, qemus_about
from support.traveller import is_settled
from support.vm import choose_engine
from support.wait import wait_until

MIB = 1024 * 1024
INTERFACE = f"cvms{os.getpid()}"
Info = dict[str, Any]
SUCCESS = (200, 204)


class Case(msgspec.Struct, frozen=True):
    """`command` with `body`, begun in `state`, by a VM whose config has these `changes`.

    In a body and in changes HOME stands for the folder of the test. `is_vague`: nobody can tell whether the
    guest has heard it.
    """

    name: str
    command: str
    state: str
    body: Any = None
    changes: dict[str, Any] = msgspec.field(default_factory=dict)
    is_vague: bool = False


class Stepwise:
    """Owns a server. `folder` is empty.

    `kills` counts, `adoptions_s` are from a start to the first answer, `steps` are those of the command.
    """

    def __init__(self, folder: Path, case: Case) -> None:
        self.kills = 0
        self.steps: list[str] = []
        self._struck: list[str] = []
        self.adoptions_s: list[float] = []
        self._case = case
        self._home = folder / "home"
        self._plans = folder / "plans"
        self._state = folder / "state"
        self._home.mkdir()
        self._plans.mkdir()
        self._plan = Plan(self._plans / "plan")
        self._engine = choose_engine("qemu")
        self._log = self._home / "serial.log"
        self._log.touch()
        for name in ("disk", "extra", "pmem"):
            make_image(self._home / name, 2 * MIB)
        (self._home / "shared").mkdir()
        self._server = Server(
            folder / "server",
            [*self._engine.flags, "--no-shutdown", "--state-dir", str(self._state)],
            program=("support.mortal", str(self._plans)),
        )
        self.vmm = self._server.vmm

    @classmethod
    @contextlib.contextmanager
    def rehearsed(cls, folder: Path, case: Case) -> Iterator[Self]:
        """Give one that knows what the command does; its end, and what it leaves behind, are checked."""
        stepwise = cls(folder, case)
        with checked(stepwise._server):
            try:
                stepwise._prepare()
                yield stepwise
            except BaseException:
                for pid in qemus_about(folder):  # nobody's child, where its manager was killed
                    os.kill(pid, signal.SIGKILL)
                raise

    def strike_each(self) -> None:
        """Kill at every step; return when the command has come to its end alive."""
        step = 1
        while self.strike(step):
            step += 1

    def strike(self, step: int) -> bool:
        """Kill at `step`, and judge what comes of it; return whether there was such a step."""
        try:
            return self._strike(step)
        except BaseException as error:
            error.add_note(f"{self._case.name}, step {step} of {self._struck}")
            error.add_note(f"The server said:\n{self._server.stderr[-4000:]}")
            raise

    def _prepare(self) -> None:
        self._server.wait_ready()
        self._prepare_target()
        if self._case.command == "vm.restore":
            self._save()
        self._clean = self._files()
        self._before, self._after = self._rehearse()

    def _strike(self, step: int) -> bool:
        self._begin()
        told = len(self._events())
        qemu = self._qemu()
        self._plan.write(step)
        reply = self._ask()
        self._struck = self._steps()
        self._plan.write(0)
        if reply is not None:
            assert reply.status in SUCCESS, reply.raw
            if self._is_alive():
                self._end()
                return False
        wait_until(lambda: not self._server.is_running, "the manager is dead", timeout_s=HOST_S)
        self._server.kill()
        self.adoptions_s.append(self._server.restart())
        self.kills += 1
        self._judge(self._outcome(told), qemu, is_answered=reply is not None)
        self._end()
        return True

    def _ask(self) -> Reply | None:
        """Have the command carried out; return None where the manager dies meanwhile."""
        call = Call(self._server.socket_path, "PUT", self._case.command, self._body())
        return call.outcome(timeout_s=GUEST_S)

    def _is_alive(self) -> bool:
        """Whether it has outlived what it does behind an answer."""
        try:
            self.vmm.get("vmm.ping")
        except (OSError, EOFError):
            return False
        return self._server.is_running

    def _judge(self, outcome: str | None, qemu: ProcessId | None, *, is_answered: bool) -> None:
        case, info = self._case, self._settled()
        expected = {
            "finished": [self._after],
            "rolled back": [self._before],
            None: [self._after] if is_answered else [self._before, self._after],
            "unknown": [self._before, self._after] if case.is_vague else [],
        }[outcome]
        assert info in expected, (outcome, info, self._before, self._after)
        self._check_machine(info, qemu)
        if info == self._before != self._after:
            self._succeed()
            info = self._settled()
            assert info == self._after
        if info is not None and info["state"] == "Running":
            self.vmm.get("vm.counters")

    def _check_machine(self, info: Info | None, qemu: ProcessId | None) -> None:
        """There is one QEMU or none, as `vm.info` says: the one of before, where nothing is to replace it."""
        runs = info is not None and info["state"] in ("Running", "Paused")
        wait_until(lambda: len(self._qemus()) == int(runs), f"{int(runs)} QEMU", timeout_s=HOST_S)
        is_same = qemu is not None and runs and self._case.command != "vm.reboot"
        assert not is_same or self._qemu() == qemu
        if info is not None and self._case.command != "vm.remove-device":
            assert self._tree_ids() <= _named_in(info["config"]), self._tree_ids()

    # Where the command begins, and what is left

    def _rehearse(self) -> tuple[Info | None, Info | None]:
        self._begin()
        before = self._settled()
        self._plan.write(0)
        self._succeed()
        self.steps = self._steps()
        after = self._settled()
        self._end()
        return before, after

    def _succeed(self) -> None:
        reply = self._ask()
        assert reply is not None and reply.status in SUCCESS, reply

    def _save(self) -> None:
        """Make what is restored."""
        saved = self._home / "saved"
        saved.mkdir()
        self.vmm.put("vm.create", self._config())
        self.vmm.put("vm.boot")
        self.vmm.put("vm.pause")
        self.vmm.put("vm.snapshot", {"destination_url": f"file://{saved}"})
        self.vmm.put("vm.delete")

    def _begin(self) -> None:
        self._prepare_target()
        if self._case.state == "none":
            return
        self.vmm.put("vm.create", self._config())
        if self._case.state != "created":
            self.vmm.put("vm.boot")
        if self._case.state == "paused":
            self.vmm.put("vm.pause")

    def _end(self) -> None:
        self.vmm.put("vm.delete")
        wait_until(lambda: not self._about_home(), "no process is left", timeout_s=HOST_S)
        left = sorted(self._files() - self._clean)
        assert not left, left
        assert not has_interface(INTERFACE)

    def _prepare_target(self) -> None:
        shutil.rmtree(self._home / "target", ignore_errors=True)
        (self._home / "target").mkdir()

    def _config(self) -> dict[str, Any]:
        config = standing_config(
            self._engine,
            self._home,
            serial={"mode": "File", "file": str(self._log)},
            disks=[{"id": "d0", "path": str(self._home / "disk"), "image_type": "Raw"}],
            memory={"size": 64 * MIB, "shared": True},
        )
        return {**config, **self._placed(self._case.changes)}

    def _body(self) -> Any:
        return self._config() if self._case.command == "vm.create" else self._placed(self._case.body)

    def _placed(self, value: Any) -> Any:
        text = msgspec.json.encode(value).replace(b"HOME", os.fsencode(self._home))
        return msgspec.json.decode(text.replace(b"INTERFACE", INTERFACE.encode()))

    # What there is

    def _settled(self) -> Info | None:
        """Return what `vm.info` says once what was to be finished is, as far as it is always the same."""

        def look() -> Reply | None:
            reply = self.vmm.exchange("GET", "vmm.jobs")
            assert reply.status == 200, reply.raw
            return reply if not msgspec.json.decode(reply.body)["jobs"] else None

        wait_until(look, "nothing is under way", timeout_s=GUEST_S)
        reply = self.vmm.exchange("GET", "vm.info")
        if reply.status == 404:
            self._tree: dict[str, Any] = {}
            return None
        assert reply.status == 200, reply.raw
        info: Info = msgspec.json.decode(reply.body)
        self._tree = info.get("device_tree") or {}
        return {"config": info["config"], "state": info["state"]}

    def _tree_ids(self) -> set[str]:
        return {node for node in self._tree if not node.startswith("_")}

    def _outcome(self, told: int) -> str | None:
        """Return what the manager told of the command, None where it told nothing."""
        found = [
            event["properties"]["outcome"]
            for event in self._events()[told:]
            if event["event"] == "settled" and event["properties"]["command"] == self._case.command
        ]
        assert len(found) <= 1, found
        return found[0] if found else None

    def _events(self) -> list[dict[str, Any]]:
        lines = (self._state / "events").read_bytes().splitlines()[1:]
        return [msgspec.json.decode(line) for line in lines]

    def _qemu(self) -> ProcessId | None:
        with contextlib.suppress(FileNotFoundError, IndexError):
            return identify(int((self._state / "pid").read_text().split()[0]))
        return None

    def _qemus(self) -> list[str]:
        return [line for line in self._about_home() if "qemu-system" in line.split()[0]]

    def _about_home(self) -> list[str]:
        """Return the command lines of who works in our folders, whoever's children they are."""
        found = []
        for pid, line in _command_lines():
            with contextlib.suppress(OSError):  # it has ended
                if pid != self._server.pid and any(
                    str(folder) in line or has_open(Path(f"/proc/{pid}"), folder)
                    for folder in (self._home, self._state)
                ):
                    found.append(line)
        return found

    def _files(self) -> set[str]:
        """Return what lies in our folders, but for what the command is to write."""
        found = {
            str(path)
            for folder in (self._home, self._state, self._server.folder)
            for path in folder.rglob("*")
            if not path.is_relative_to(self._home / "target")
        }
        kept = {str(self._state / name) for name in ("journal", "journal.old", "events", "vm", "qemu.log")}
        return found - kept

    def _steps(self) -> list[str]:
        """Return the steps since the last plan, in order."""
        number, _ = self._plan.read()
        lines = (self._plans / "steps").read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{number} ")]


class SteppedArrival(Stepwise):
    """`vm.receive-migration`, of a VM that another manager, which lives, holds until it has sent it."""

    def _ask(self) -> Reply | None:
        with self._sending() as source:
            call = Call(self._server.socket_path, "PUT", self._case.command, self._body())
            spend(GUEST_S, unless=lambda: self._way.exists() or call.is_over)
            source.vmm.exchange("PUT", "vm.send-migration", {"destination_url": f"unix:{self._way}"})
            reply = call.outcome(timeout_s=GUEST_S)
            wait_until(lambda: is_settled(source), "the source is settled", timeout_s=GUEST_S)
            self._source_state = self._state_of(source)
        return reply

    def _judge(self, outcome: str | None, qemu: ProcessId | None, *, is_answered: bool) -> None:
        here = self._settled()
        has_left, runs_there = self._source_state is None, self._source_state == "Running"
        assert not (here is not None and runs_there), "The VM runs twice"
        assert here is not None or not has_left, "The VM is lost"
        super()._judge(outcome, qemu, is_answered=is_answered)

    @property
    def _way(self) -> Path:
        return self._home / "way"

    @contextlib.contextmanager
    def _sending(self) -> Iterator[Server]:
        self._sources += 1
        source = Server(self._home.parent / f"source{self._sources}", [*self._engine.flags, "--no-shutdown"])
        try:
            source.wait_ready()
            source.vmm.put("vm.create", self._config())
            source.vmm.put("vm.boot")
            yield source
        finally:
            source.check_end()

    _sources = 0

    @staticmethod
    def _state_of(server: Server) -> str | None:
        if not server.is_running:
            return None
        try:
            return str(server.vmm.get("vm.info")["state"])
        except (OSError, EOFError):
            return None


def _named_in(config: dict[str, Any]) -> set[str]:
    """Return the ids of all that is called by one, at any depth."""
    found: set[str] = set()
    waiting: list[Any] = [config]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            found |= {one["id"]} if "id" in one else set()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return found


def _command_lines() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            pid = int(path.parent.name)
            if pid != os.getpid() and (words := path.read_bytes()):
                yield pid, words.replace(b"\0", b" ").decode(errors="replace")
