"""Two VMMs between which a VM moves, and what can go wrong on the way: a table of faults, each at any moment.

What they are judged by is in `rounds.py`.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from support.attack import Held, assert_holds_no_more, find_qemu, spend
from support.booted import MIB, Booted, EventFile
from support.deadline import HOST_S
from support.process import ProcessId, state_of
from support.proxy import Proxy
from support.server import Server
from support.vm import choose_engine

LITTLE_MEMORY_BYTES = 700 * MIB  # of addresses, for a QEMU: it starts, and has none for a guest's RAM
LONGEST_HALT_S = 1.0
BALLAST = "ballast"  # what fills the folder with little room
CONNECTIONS = 2

# How a VM moves.
OVER_CONNECTIONS, HANDED_OVER, WITH_ITS_DISK, POSTCOPY = (
    "over connections",
    "handed over",
    "with its disk",
    "postcopy",
)

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
    """A VMM of its own. `guest` talks to its guest, if there is one.

    With a `state_dir` its QEMU outlives it where it is killed: whoever follows it there ends that.
    """

    def __init__(self, folder: Path, engine: str, state_dir: Path | None = None) -> None:
        self._state_dir = state_dir
        self._state_flags = [] if state_dir is None else ["--state-dir", str(state_dir)]
        events = EventFile(folder.with_name(f"{folder.name}.events"))
        self.engine = engine
        self.is_struck = False
        self.server = Server(
            folder,
            [*choose_engine(engine).flags, "--event-monitor", f"path={events.path}", *self._state_flags],
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

    @property
    def phase(self) -> str:
        """That of the migration."""
        phase: str = self.vmm.get("vm.migration-progress")["phase"]
        return phase

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
            if self._state_dir is not None:
                (self._state_dir.parent / BALLAST).unlink(missing_ok=True)
                folder = self.server.folder
                flags = [*choose_engine(self.engine).flags, *self._state_flags]
                follower = Server(folder.with_name(f"{folder.name}.follower"), flags)
                follower.wait_ready()
                follower.check_end()
        self.server.check_end()


class Round(msgspec.Struct):
    """What a fault can get at. `link` is what the connections go through; `bereft` has lost its QEMU.

    The VM was in the state `was`, and goes the `way`. The image `disk`, if any, is made where it goes.
    """

    source: Side
    destination: Side
    link: Proxy
    random: random.Random
    home: Path
    was: str
    way: str
    disk: Path | None = None
    bereft: Side | None = None

    def side(self, name: str) -> Side:
        side: Side = getattr(self, name)
        return side


Strike = Callable[[Round], None]


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """`strike` is the blow, at a random moment. One that `is_prepared` stands before the migration begins.

    `kills` names the side that it may end; then its VM may be gone with it. What `is_special` has a
    destination of its own. One that `may_be_local` needs no link: the VM may be handed over. With
    `is_in_small_folder` its disk goes there.
    """

    name: str
    strike: Strike
    kills: str | None = None
    is_prepared: bool = False
    is_special: bool = False
    is_tls: bool = False
    engines: tuple[str, ...] = ("fake", "qemu")
    may_be_local: bool = False
    is_in_small_folder: bool = False
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
    ballast = round_.home / "small" / BALLAST
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
    Fault(
        name="destination without room for the disk",
        strike=_fill_state_folder,
        is_prepared=True,
        needs_root=True,
        is_in_small_folder=True,
    ),
)


def faults_for(engine: str) -> list[Fault]:
    """Return those that there are for `engine`, and that this process may cause."""
    is_root = os.geteuid() == 0
    return [fault for fault in FAULTS if engine in fault.engines and (is_root or not fault.needs_root)]
