"""A VM that moves to and fro and is struck each time, and what must hold whatever happens.

`Rounds.strike` migrates once, has one fault happen and then fails unless the VM runs on one side at most and
is not lost, and whoever is left holds nothing that he should not. On the fake engine, or on QEMU with a guest
that writes to its memory and its disk and checks both. A VM whose memory is in two places, with Postcopy, is
lost with either of them, and with nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from cloudvmm.host import userfault
from support.attack import Call, spend
from support.booted import MIB, make_image, vm_config
from support.certificate import Authority
from support.deadline import GUEST_S, HOST_S
from support.fault import (
    BALLAST,
    CONNECTIONS,
    HANDED_OVER,
    MOMENTS,
    OVER_CONNECTIONS,
    POSTCOPY,
    WITH_ITS_DISK,
    Fault,
    Round,
    Side,
)
from support.proxy import Proxy
from support.traveller import HOST, begin_load, check_load, end_load, is_settled
from support.vm import choose_engine
from support.wait import wait_until

SMALL_BYTES = 1 << 20
DISK_BYTES = {"fake": 256 * 1024, "qemu": 4 * MIB}
# A connection for memory is made anew for two minutes, and what is in doubt is told then.
SETTLED_S = 3 * GUEST_S
TORN_S = 10.0


class Rounds:
    """Two sides in `home` that migrate and are struck, again and again. `outcomes` counts what was seen."""

    def __init__(self, home: Path, engine: str, seed: int, *, last_moment_s: float) -> None:
        self.outcomes: Counter[str] = Counter()
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
        self._first_disk = self._disk = make_image(home / "disk", DISK_BYTES[engine])
        self._source = self._make_base() if engine == "qemu" else self._new_source()
        self._destination: Side | None = None

    def strike(self, fault: Fault) -> None:
        """Migrate once, with `fault`, and judge what comes of it."""
        number = next(self._numbers)
        moment = self._random.choice(MOMENTS)
        after_s = self._random.uniform(0, self._last_moment_s)
        way = self._random.choice(self._ways(fault))
        what = f"seed {self._seed}, round {number}: {fault.name}, {moment}, after {after_s:.3f} s, {way}"
        try:
            outcome = self._strike(fault, way, moment, after_s)
        except BaseException as error:
            error.add_note(what)
            for side in self._sides:
                error.add_note(f"{side.server.folder.name} said:\n{side.server.stderr[-3000:]}")
            raise
        if fault.is_special and outcome.startswith("stayed"):
            self._drop_destination()
        self.outcomes[f"{outcome}, {way}"] += 1

    def close(self) -> None:
        """The last guest's disk is what it wrote; nobody leaves anything behind."""
        if self._engine == "qemu" and self._source.state == "Running":
            end_load(self._source.guest, self._disk)
        for side in list(self._sides):
            self._retire(side)
        self._undo.close()

    def _ways(self, fault: Fault) -> list[str]:
        if fault.is_in_small_folder:
            return [WITH_ITS_DISK]
        ways = [OVER_CONNECTIONS, WITH_ITS_DISK]
        if fault.may_be_local:
            ways += [HANDED_OVER, HANDED_OVER]
        # The fake engine's memory is never in two places.
        if self._engine == "qemu" and userfault.refusal() is None:
            ways.append(POSTCOPY)
        return ways

    def _strike(self, fault: Fault, way: str, moment: tuple[str, str] | None, after_s: float) -> str:
        source, destination = self._source, self._place(fault)
        was = source.state
        assert was in ("Running", "Paused"), was
        port = _free_port()
        speed = self._random.choice((None, 200 * MIB, 30 * MIB))
        with Proxy(HOST, port, bytes_per_s=speed) as link:
            round_ = Round(source, destination, link, self._random, self._home, was, way)
            receive, send = self._asked(fault, round_, port)
            if fault.is_prepared:
                fault.strike(round_)
            before = {side: side.events.names() for side in (source, destination)}
            answer = Call(destination.server.socket_path, "PUT", "vm.receive-migration", receive)
            _wait_for_event(destination, "vm/migration-receive-ready", before[destination])
            source.vmm.put("vm.send-migration", send, expect=204)
            if not fault.is_prepared:
                self._wait_for_moment(round_, moment, before, answer)
                spend(after_s)
                if fault.kills is not None:
                    round_.side(fault.kills).is_struck = True
                fault.strike(round_)
            if round_.bereft is not None:
                wait_until(lambda: round_.bereft.state is None, "it misses its QEMU", timeout_s=HOST_S)
            outcome = self._judge(fault, round_, answer)
            if way == HANDED_OVER:
                self._check_way(Path(receive["receiver_url"].removeprefix("unix:")), fault)
            if round_.disk is not None and round_.disk != self._disk:
                # Whoever is killed leaves an image that nobody has yet.
                assert not round_.disk.exists() or fault.kills == "destination", round_.disk
                round_.disk.unlink(missing_ok=True)
            return outcome

    def _asked(self, fault: Fault, round_: Round, port: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what the destination and the source are told."""
        receive: dict[str, Any] = {"receiver_url": f"tcp:{HOST}:{port}"}
        send: dict[str, Any] = {"destination_url": round_.link.url}
        if fault.is_tls:
            receive["tls_dir"] = str(self._home / "tls")
            send["tls_dir"] = str(self._home / fault.tls_dir)
        if round_.way == HANDED_OVER:
            receive["receiver_url"] = f"unix:{self._home}/way{port}"
            return receive, {"destination_url": receive["receiver_url"], "local": True}
        if round_.way == POSTCOPY:
            mode = {"memory_mode": "Postcopy"}
            early = {"timeout_s": 1, "timeout_strategy": "Ignore"} if self._random.random() < 0.5 else {}
            return receive | mode, send | mode | early
        if round_.way == WITH_ITS_DISK:
            folder = self._small_folder().parent if fault.is_in_small_folder else self._home
            round_.disk = folder / f"disk{next(self._numbers)}"
            receive["overrides"] = {"disks": [{"id": "d", "path": str(round_.disk)}]}
            send["copy_disks"] = ["d"]
        return receive, send | {"connections": CONNECTIONS}

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

    def _judge(self, fault: Fault, round_: Round, answer: Call) -> str:
        source, destination, was = round_.source, round_.destination, round_.was
        if round_.way == POSTCOPY and fault.kills is not None and self._is_torn(fault, round_, answer):
            return self._torn(round_)
        wait_until(lambda: is_settled(source.server), "the source is settled", timeout_s=SETTLED_S)
        reply = answer.outcome(timeout_s=SETTLED_S)
        state = source.state
        there = destination.state
        assert not (state == "Running" and there == "Running"), "The VM runs twice"
        if there is not None:
            assert reply is not None and reply.status == 204, reply
        if state == "Running" or (state == "Paused" and was == "Paused"):
            return self._stayed(round_, there)
        if state == "Paused":
            return self._left_in_doubt(round_, there)
        assert state is None, state
        return self._left(fault, round_, there)

    def _check_way(self, path: Path, fault: Fault) -> None:
        if fault.kills == "destination":
            path.unlink(missing_ok=True)  # whoever is killed cannot remove its socket
        assert not path.exists()

    def _is_torn(self, fault: Fault, round_: Round, answer: Call) -> bool:
        """Tell whether the half of a VM that was in two places is gone."""
        source, destination = round_.source, round_.destination

        def is_over() -> bool:
            return is_settled(source.server) and answer.is_over

        spend(TORN_S, unless=is_over)
        if is_over():
            return "must not be resumed" in source.server.stderr + destination.server.stderr
        left = destination if fault.kills == "source" else source
        return left.server.is_running and left.phase == "Postcopy"

    def _torn(self, round_: Round) -> str:
        """The half that is left runs nowhere but where it went."""
        source = round_.source
        if source.server.is_running and is_settled(source.server) and source.state is not None:
            assert source.state == "Paused"
            words = source.vmm.put("vm.resume", expect=500)
            assert "has gone on in the other VMM" in " ".join(words), words
            source.vmm.put("vm.delete", expect=204)
            source.check_holds_nothing()
        for side in (source, round_.destination):
            self._retire(side)
        self._destination = None
        self._source = self._new_source()
        return "gone with one of its halves"

    def _stayed(self, round_: Round, there: str | None) -> str:
        assert there is None, there
        destination = round_.destination
        if destination.server.is_running:
            destination.check_holds_nothing()
        else:
            self._retire(destination)
            self._destination = None
        self._check(self._source, round_.was)
        return "stayed"

    def _left_in_doubt(self, round_: Round, there: str | None) -> str:
        source, destination, was = round_.source, round_.destination, round_.was
        assert "then call vm.resume" in source.server.stderr
        if there is None:
            source.vmm.put("vm.resume", expect=204)
            self._stayed(msgspec.structs.replace(round_, was="Running"), there)
            return "in doubt, and resumed at the source"
        assert there == was
        if was == "Running" and self._engine == "qemu" and round_.disk is None:
            words = source.vmm.put("vm.resume", expect=500)
            assert "Cannot lock images of all block devices" in words, words
        source.vmm.put("vm.delete", expect=204)
        source.check_holds_nothing()
        self._arrived(round_)
        self._destination = source
        self._check(destination, was)
        return "in doubt, and there"

    def _left(self, fault: Fault, round_: Round, there: str | None) -> str:
        """The source has nothing: it ended because the VM is elsewhere, or of the blow."""
        source, destination, was = round_.source, round_.destination, round_.was
        self._retire(source)
        if there is not None:
            assert there == was, there
            self._arrived(round_)
            self._destination = None
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

    def _arrived(self, round_: Round) -> None:
        """The VM is at the destination, with its disk."""
        self._source = round_.destination
        if round_.disk is not None:
            if self._disk != self._first_disk:
                self._disk.unlink()
            self._disk = round_.disk

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
            state_dir = self._small_folder() if "state folder" in fault.name else None
            self._destination = self._new(state_dir)
        return self._destination

    def _drop_destination(self) -> None:
        if self._destination is not None:
            self._retire(self._destination)
            self._destination = None

    def _small_folder(self) -> Path:
        """Return a path for a folder where there is little room."""
        folder = self._home / "small"
        if not folder.exists():
            folder.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "small", folder], check=True)
            self._undo.callback(subprocess.run, ["umount", "-l", folder], check=True)
        (folder / BALLAST).unlink(missing_ok=True)
        return folder / f"state{next(self._numbers)}"

    def _new(self, state_dir: Path | None = None) -> Side:
        side = Side(self._home / f"vmm{next(self._numbers)}", self._engine, state_dir)
        self._sides.append(side)
        return side

    def _retire(self, side: Side) -> None:
        self._sides.remove(side)
        side.close()

    def _new_source(self) -> Side:
        side = self._new()
        self._disk = self._first_disk
        if self._engine == "qemu":
            shutil.copyfile(self._home / "disk.base", self._disk)
            side.vmm.put("vm.restore", {"source_url": f"file://{self._home / 'base'}", "resume": True})
            side.guest.open_shell()
            return side
        payload = choose_engine("fake").payload(self._home)
        config = {"payload": payload, "memory": {"size": MIB, "shared": True}, "console": {"mode": "Off"}}
        side.vmm.put("vm.create", config | {"disks": [self._disk_config()]})
        side.vmm.put("vm.boot")
        if self._random.random() < 0.3:
            side.vmm.put("vm.pause")
        return side

    def _disk_config(self) -> dict[str, Any]:
        return {"id": "d", "path": str(self._disk), "image_type": "Raw"}

    def _make_base(self) -> Side:
        """Boot a guest, and save it under load with what is on its disk, for when it is gone."""
        side = self._new()
        memory = {"size": 256 * MIB, "shared": True}
        side.vmm.put("vm.create", vm_config(memory=memory, disks=[self._disk_config()]))
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
