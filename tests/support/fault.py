"""Two VMMs between which a VM moves, and what can go wrong on the way: a table of faults, each at any moment.

`Rounds.strike` migrates once, has one fault happen and then fails unless the VM runs on one side at most and
is not lost, and whoever is left holds nothing that he should not. On the fake engine, or on QEMU with a guest
that writes to its memory and its disk and checks both.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from support.attack import Call, Held, assert_holds_no_more, find_qemu, spend
from support.booted import MIB, Booted, EventFile, make_image, vm_config
from support.certificate import Authority
from support.deadline import GUEST_S, HOST_S
from support.process import ProcessId, state_of
from support.proxy import Proxy
from support.server import Server
from support.traveller import begin_load, check_load, end_load
from support.vm import choose_engine
from support.wait import wait_until

HOST = "127.0.0.1"
SMALL_BYTES = 1 << 20
LITTLE_MEMORY_BYTES = 700 * MIB  # of addresses, for a QEMU: it starts, and has none for a guest's RAM
LONGEST_HALT_S = 1.0
CONNECTIONS = 2

# What is told, and by whom, just before the blow falls; None is the request itself.
MOMENTS: tuple[tuple[str, str] | None, ...] = (
    None,
    ("source", "vm/migration-started"),
    ("destination", "vm/migration-receive-started"),
    ("destination", "vm/restoring"),
    ("destination", "vm/restored"),
    ("source", "vm/paused"),
    ("source", "vm/snapshotted"),
    ("destination", "vm/resuming"),
    ("destination", "vm/resumed"),
)


class Side:
    """A VMM of its own. `guest` talks to its guest, if there is one."""

    def __init__(self, folder: Path, engine: str, *flags: str) -> None:
        events = EventFile(folder.with_name(f"{folder.name}.events"))
        self.engine = engine
        self.is_struck = False
        self.server = Server(
            folder, [*choose_engine(engine).flags, "--event-monitor", f"path={events.path}", *flags]
        )
        self.server.wait_ready()
        self.guest = Booted(self.server, folder, events)
        self.vmm = self.server.vmm
        self.vmm.get("vmm.ping")
        self.held = Held(self.server.pid)

    @property
    def events(self) -> EventFile:
        return self.guest.events

    @property
    def state(self) -> str | None:
        """The VM's, None where there is nothing."""
        if not self.server.is_running:
            return None
        try:
            reply = self.vmm.exchange("GET", "vm.info")
        except (OSError, EOFError):  # it is about to end
            self.server.wait_end()
            return None
        return msgspec.json.decode(reply.body)["state"] if reply.status == 200 else None

    def is_settled(self) -> bool:
        """Tell whether a sender has ended, or has its VM back."""
        if not self.server.is_running:
            return True
        try:
            return self.vmm.exchange("GET", "vm.counters").status == 200
        except (OSError, EOFError):
            return False  # it is about to end

    def check_holds_nothing(self) -> None:
        """Fail unless it has no VM, and no more of anything than at the beginning."""
        assert self.state is None, f"{self.state}: {self.server.stderr}"
        assert_holds_no_more(self.server.pid, self.held, timeout_s=HOST_S)

    def close(self) -> None:
        self.guest.close_shell()
        if self.is_struck and not self.server.is_running:
            # It may have ended before the blow fell, or of it.
            self.server.expected_status = self.server.wait_end()
            assert self.server.expected_status in (0, 1, -signal.SIGKILL)
            if self.server.expected_status == 1:
                self.server.keep("api")  # whoever fails leaves it, as the reference does
        self.server.check_end()


class Round(msgspec.Struct):
    """What a fault can get at. `link` is what the connections go through; `bereft` has lost its QEMU."""

    source: Side
    destination: Side
    link: Proxy
    random: random.Random
    home: Path
    bereft: Side | None = None

    def side(self, name: str) -> Side:
        side: Side = getattr(self, name)
        return side


Strike = Callable[[Round], None]


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """`strike` is the blow, at a random moment. One that `is_prepared` stands before the migration begins.

    `kills` names the side that it may end; then its VM may be gone with it. What `is_special` has a
    destination of its own. One that `may_be_local` needs no link: the VM may be handed over.
    """

    name: str
    strike: Strike
    kills: str | None = None
    is_prepared: bool = False
    is_special: bool = False
    is_tls: bool = False
    engines: tuple[str, ...] = ("fake", "qemu")
    may_be_local: bool = False
    needs_root: bool = False
    tls_dir: str = "tls"


def _kill_manager(name: str) -> Strike:
    def strike(round_: Round) -> None:
        server = round_.side(name).server
        server.kill()
        server.wait_end()

    return strike


def _kill_qemu(name: str) -> Strike:
    def strike(round_: Round) -> None:
        qemu = find_qemu(round_.side(name).server)
        if qemu is not None:
            qemu.kill()
            round_.bereft = round_.side(name)

    return strike


def _halt(name: str, whom: Callable[[Server], ProcessId | None]) -> Strike:
    def strike(round_: Round) -> None:
        who = whom(round_.side(name).server)
        if who is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(who.pid, signal.SIGSTOP)
        spend(round_.random.uniform(0, LONGEST_HALT_S), unless=lambda: not state_of(who.pid))
        with contextlib.suppress(ProcessLookupError):
            os.kill(who.pid, signal.SIGCONT)

    return strike


def _manager(server: Server) -> ProcessId | None:
    return ProcessId(server.pid, 0) if server.is_running else None


def _delay(round_: Round) -> None:
    round_.link.stop()
    spend(round_.random.uniform(0, LONGEST_HALT_S))
    round_.link.go_on()


def _speak_another_version(round_: Round) -> None:
    round_.link.rewrite(lambda data: data.replace(b'"versions":[1]', b'"versions":[7]'))


def _answer_another_version(round_: Round) -> None:
    round_.link.rewrite(lambda data: data.replace(b'"version":1}', b'"version":7}'))


def _offer_of_another_engine(round_: Round) -> None:
    round_.link.rewrite(
        lambda data: data.replace(b'"engine":"fake"', b'"engine":"cake"').replace(
            b'"engine":"qemu"', b'"engine":"qomu"'
        )
    )


def _limit_memory(round_: Round) -> None:
    pid = round_.destination.server.pid
    resource.prlimit(pid, resource.RLIMIT_AS, (LITTLE_MEMORY_BYTES, LITTLE_MEMORY_BYTES))


def _fill_state_folder(round_: Round) -> None:
    ballast = round_.home / "small" / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(b"x" * 512):
            pass


FAULTS = (
    Fault(
        name="kill the source's manager", strike=_kill_manager("source"), kills="source", may_be_local=True
    ),
    Fault(
        name="kill the destination's manager",
        strike=_kill_manager("destination"),
        kills="destination",
        may_be_local=True,
    ),
    Fault(
        name="kill the source's QEMU",
        strike=_kill_qemu("source"),
        kills="source",
        engines=("qemu",),
        may_be_local=True,
    ),
    Fault(
        name="kill the destination's QEMU",
        strike=_kill_qemu("destination"),
        kills="destination",
        engines=("qemu",),
        may_be_local=True,
    ),
    Fault(name="cut the control connection", strike=lambda round_: round_.link.cut(0)),
    Fault(name="cut the first state connection", strike=lambda round_: round_.link.cut(1)),
    Fault(name="cut the last state connection", strike=lambda round_: round_.link.cut(CONNECTIONS)),
    Fault(name="cut every connection", strike=lambda round_: round_.link.cut()),
    Fault(name="halt the source's manager", strike=_halt("source", _manager), may_be_local=True),
    Fault(name="halt the destination's manager", strike=_halt("destination", _manager), may_be_local=True),
    Fault(
        name="halt the source's QEMU", strike=_halt("source", find_qemu), engines=("qemu",), may_be_local=True
    ),
    Fault(
        name="halt the destination's QEMU",
        strike=_halt("destination", find_qemu),
        engines=("qemu",),
        may_be_local=True,
    ),
    Fault(name="delay every connection", strike=_delay),
    Fault(name="corrupt the control connection", strike=lambda round_: round_.link.corrupt(0), is_tls=True),
    Fault(name="corrupt a state connection", strike=lambda round_: round_.link.corrupt(1), is_tls=True),
    Fault(
        name="certificate of another authority",
        strike=lambda round_: None,
        is_prepared=True,
        is_tls=True,
        tls_dir="strange-tls",
    ),
    Fault(name="sender of another version", strike=_speak_another_version, is_prepared=True),
    Fault(name="receiver of another version", strike=_answer_another_version, is_prepared=True),
    Fault(name="VM of another engine", strike=_offer_of_another_engine, is_prepared=True),
    Fault(
        name="destination with little memory",
        strike=_limit_memory,
        is_prepared=True,
        is_special=True,
        engines=("qemu",),
    ),
    Fault(
        name="destination whose state folder is full",
        strike=_fill_state_folder,
        needs_root=True,
        is_special=True,
    ),
    Fault(
        name="destination whose state folder was full",
        strike=_fill_state_folder,
        is_prepared=True,
        needs_root=True,
        is_special=True,
    ),
)


def faults_for(engine: str) -> list[Fault]:
    """Return those that there are for `engine`, and that this process may cause."""
    is_root = os.geteuid() == 0
    return [fault for fault in FAULTS if engine in fault.engines and (is_root or not fault.needs_root)]


class Rounds:
    """Two sides in `home` that migrate and are struck, again and again. `outcomes` has what was seen."""

    def __init__(self, home: Path, engine: str, seed: int, *, last_moment_s: float) -> None:
        self.outcomes: dict[str, set[str]] = {}
        self._home = home
        self._engine = engine
        self._seed = seed
        self._random = random.Random(seed)
        self._last_moment_s = last_moment_s
        self._numbers = itertools.count()
        self._undo = contextlib.ExitStack()
        self._sides: list[Side] = []
        ours, others = Authority(home / "tls", HOST), Authority(home / "others", HOST)
        others.trusting(others, home / "strange-tls")
        assert ours.tls_dir == str(home / "tls")
        self._disk = make_image(home / "disk", 4 * MIB)
        self._source = self._make_base() if engine == "qemu" else self._new_source()
        self._destination: Side | None = None

    def strike(self, fault: Fault) -> None:
        """Migrate once, with `fault`, and judge what comes of it."""
        number = next(self._numbers)
        moment = self._random.choice(MOMENTS)
        after_s = self._random.uniform(0, self._last_moment_s)
        what = f"seed {self._seed}, round {number}: {fault.name}, {moment}, after {after_s:.3f} s"
        try:
            outcome = self._strike(fault, moment, after_s)
        except BaseException as error:
            error.add_note(what)
            for side in self._sides:
                error.add_note(f"{side.server.folder.name} said:\n{side.server.stderr[-3000:]}")
            raise
        if fault.is_special and outcome.startswith("stayed"):
            self._drop_destination()
        self.outcomes.setdefault(fault.name, set()).add(outcome)

    def close(self) -> None:
        """The last guest's disk is what it wrote; nobody leaves anything behind."""
        if self._engine == "qemu" and self._source.state == "Running":
            end_load(self._source.guest, self._disk)
        for side in list(self._sides):
            self._retire(side)
        self._undo.close()

    def _strike(self, fault: Fault, moment: tuple[str, str] | None, after_s: float) -> str:
        source, destination = self._source, self._place(fault)
        was = source.state
        assert was in ("Running", "Paused"), was
        port = _free_port()
        speed = self._random.choice((None, 200 * MIB, 30 * MIB))
        receive: dict[str, Any] = {"receiver_url": f"tcp:{HOST}:{port}"}
        send: dict[str, Any] = {"connections": CONNECTIONS}
        is_local = fault.may_be_local and self._random.random() < 0.5
        if is_local:
            receive["receiver_url"] = f"unix:{self._home}/way{port}"
            send = {"destination_url": receive["receiver_url"], "local": True}
        if fault.is_tls:
            receive["tls_dir"] = str(self._home / "tls")
            send["tls_dir"] = str(self._home / fault.tls_dir)
        with Proxy(HOST, port, bytes_per_s=speed) as link:
            round_ = Round(source, destination, link, self._random, self._home)
            if fault.is_prepared:
                fault.strike(round_)
            before = {side: side.events.names() for side in (source, destination)}
            answer = Call(destination.server.socket_path, "PUT", "vm.receive-migration", receive)
            _wait_for_event(destination, "vm/migration-receive-ready", before[destination])
            source.vmm.put("vm.send-migration", {"destination_url": link.url, **send}, expect=204)
            if not fault.is_prepared:
                self._wait_for_moment(round_, moment, before, answer)
                spend(after_s)
                if fault.kills is not None:
                    round_.side(fault.kills).is_struck = True
                fault.strike(round_)
            if round_.bereft is not None:
                wait_until(lambda: round_.bereft.state is None, "it misses its QEMU", timeout_s=HOST_S)
            outcome = self._judge(fault, source, destination, answer, was)
            if is_local:
                self._check_way(Path(receive["receiver_url"].removeprefix("unix:")), fault)
            return f"{outcome}, handed over" if is_local else outcome

    def _wait_for_moment(
        self,
        round_: Round,
        moment: tuple[str, str] | None,
        before: dict[Side, list[str]],
        answer: Call,
    ) -> None:
        if moment is None:
            return
        side, name = round_.side(moment[0]), moment[1]
        count = before[side].count(name)
        spend(GUEST_S, unless=lambda: side.events.names().count(name) > count or answer.is_over)

    def _judge(self, fault: Fault, source: Side, destination: Side, answer: Call, was: str) -> str:
        wait_until(source.is_settled, "the source is settled", timeout_s=GUEST_S)
        reply = answer.outcome(timeout_s=GUEST_S)
        state = source.state
        there = destination.state
        assert not (state == "Running" and there == "Running"), "The VM runs twice"
        if there is not None:
            assert reply is not None and reply.status == 204, reply
        if state == "Running" or (state == "Paused" and was == "Paused"):
            return self._stayed(destination, there, was)
        if state == "Paused":
            return self._left_in_doubt(fault, source, destination, there, was)
        assert state is None, state
        return self._left(fault, source, destination, there, was)

    def _check_way(self, path: Path, fault: Fault) -> None:
        if fault.kills == "destination":
            path.unlink(missing_ok=True)  # whoever is killed cannot remove its socket
        assert not path.exists()

    def _stayed(self, destination: Side, there: str | None, was: str) -> str:
        assert there is None, there
        if destination.server.is_running:
            destination.check_holds_nothing()
        else:
            self._retire(destination)
            self._destination = None
        self._check(self._source, was)
        return "stayed"

    def _left_in_doubt(
        self, fault: Fault, source: Side, destination: Side, there: str | None, was: str
    ) -> str:
        assert "then call vm.resume" in source.server.stderr
        if there is None:
            source.vmm.put("vm.resume", expect=204)
            self._stayed(destination, there, "Running")
            return "in doubt, and resumed at the source"
        assert there == was
        if was == "Running" and self._engine == "qemu":
            words = source.vmm.put("vm.resume", expect=500)
            assert "Cannot lock images of all block devices" in words, words
        source.vmm.put("vm.delete", expect=204)
        source.check_holds_nothing()
        self._source, self._destination = destination, source
        self._check(destination, was)
        return "in doubt, and there"

    def _left(self, fault: Fault, source: Side, destination: Side, there: str | None, was: str) -> str:
        """The source has nothing: it ended because the VM is elsewhere, or of the blow."""
        self._retire(source)
        if there is not None:
            assert there == was, there
            self._source, self._destination = destination, None
            self._check(destination, was)
            return "moved"
        if fault.kills == "source":
            assert destination.server.is_running
            destination.check_holds_nothing()
            self._source = self._new_source()
            return "gone with its source"
        assert fault.kills == "destination", "The VM is lost"
        # It was there, ran, and has gone with who had it.
        assert "vm/migration-finished" in source.events.names()
        assert ("vm/resumed" if was == "Running" else "vm/restored") in destination.events.names()
        self._retire(destination)
        self._destination = None
        self._source = self._new_source()
        return "moved, and gone with its destination"

    def _check(self, side: Side, was: str) -> None:
        """The guest has all that it had, and its disk is what it wrote last."""
        assert side.state == was
        if self._engine != "qemu":
            return
        side.guest.open_shell()
        check_load(side.guest)
        if self._random.random() < 0.2:
            end_load(side.guest, self._disk)
            begin_load(side.guest)

    def _place(self, fault: Fault) -> Side:
        """Return where the VM is to go: who is left over from the last round, or a new one."""
        if fault.is_special:
            self._drop_destination()
        if self._destination is None:
            flags = ["--state-dir", str(self._small_folder())] if "state folder" in fault.name else []
            self._destination = self._new(*flags)
        return self._destination

    def _drop_destination(self) -> None:
        if self._destination is not None:
            self._retire(self._destination)
            self._destination = None

    def _small_folder(self) -> Path:
        folder = self._home / "small"
        if not folder.exists():
            folder.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "small", folder], check=True)
            self._undo.callback(subprocess.run, ["umount", "-l", folder], check=True)
        (folder / "ballast").unlink(missing_ok=True)
        return folder / f"state{next(self._numbers)}"

    def _new(self, *flags: str) -> Side:
        side = Side(self._home / f"vmm{next(self._numbers)}", self._engine, *flags)
        self._sides.append(side)
        return side

    def _retire(self, side: Side) -> None:
        self._sides.remove(side)
        side.close()

    def _new_source(self) -> Side:
        side = self._new()
        if self._engine == "qemu":
            shutil.copyfile(self._home / "disk.base", self._disk)
            side.vmm.put("vm.restore", {"source_url": f"file://{self._home / 'base'}", "resume": True})
            side.guest.open_shell()
            return side
        payload = choose_engine("fake").payload(self._home)
        shared = {"size": MIB, "shared": True}
        side.vmm.put("vm.create", {"payload": payload, "memory": shared, "console": {"mode": "Off"}})
        side.vmm.put("vm.boot")
        if self._random.random() < 0.3:
            side.vmm.put("vm.pause")
        return side

    def _make_base(self) -> Side:
        """Boot a guest, and save it under load with what is on its disk, for when it is gone."""
        side = self._new()
        disk = {"id": "d", "path": str(self._disk), "image_type": "Raw"}
        side.vmm.put("vm.create", vm_config(memory={"size": 256 * MIB, "shared": True}, disks=[disk]))
        side.guest.open_shell()
        side.vmm.put("vm.boot")
        side.guest.wait_ready()
        begin_load(side.guest)
        check_load(side.guest)
        base = self._home / "base"
        base.mkdir()
        side.vmm.put("vm.pause")
        side.vmm.put("vm.snapshot", {"destination_url": f"file://{base}"})
        shutil.copyfile(self._disk, self._home / "disk.base")
        side.vmm.put("vm.resume")
        return side


def _wait_for_event(side: Side, name: str, before: list[str]) -> None:
    side.events.wait(name, count=before.count(name) + 1, timeout_s=HOST_S)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port
