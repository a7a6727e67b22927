"""A manager that dies at each step of sending its VM, and where the VM is then: in one place, not lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cloudvmm.control.runner import MIGRATION
from support.attack import Call, spend, standing_config
from support.booted import MIB, make_image
from support.deadline import GUEST_S, HOST_S
from support.mortal import Plan
from support.server import Server, checked
from support.traveller import is_settled
from support.vm import choose_engine
from support.wait import wait_until

ARRIVAL_S = 1.0  # for whoever comes after all


class Departures:
    """Each is of a VM of its own, made in `folder`. `outcomes` are what was seen."""

    def __init__(self, folder: Path) -> None:
        self.adoptions_s: list[float] = []
        self.outcomes: set[str] = set()
        self._folder = folder
        self._engine = choose_engine("qemu")

    def strike(self, step: int) -> bool:
        """Kill whoever sends at `step`, and judge where the VM is; return whether there was such a step."""
        home = self._folder / str(step)
        home.mkdir()
        try:
            with self._server(home / "there") as there, self._mortal(home, step) as (here, plan):
                return self._strike(home, here, there, plan, step)
        except BaseException as error:
            error.add_note(f"Step {step}")
            raise

    def _strike(self, home: Path, here: Server, there: Server, plan: Plan, step: int) -> bool:
        way = home / "way"
        arrival = Call(there.socket_path, "PUT", "vm.receive-migration", {"receiver_url": f"unix:{way}"})
        wait_until(way.exists, "it is waited for", timeout_s=HOST_S)
        plan.write(step)
        body = {"destination_url": f"unix:{way}"}
        departure = Call(here.socket_path, "PUT", "vm.send-migration", body)
        departure.outcome(timeout_s=GUEST_S)
        spend(GUEST_S, unless=lambda: is_settled(here))
        if not here.is_running and here.wait_end() == 0:
            assert state_of(there) == "Running"
            return False
        if here.is_running:
            plan.write(0)
            here.vmm.put("vmm.shutdown")  # it has its VM back, as nobody was there any more
            there.vmm.exchange("PUT", "vm.delete")
            raise AssertionError("The VM came back although nobody was killed")
        here.kill()
        plan.write(0)
        self.adoptions_s.append(here.restart())
        spend(ARRIVAL_S, unless=lambda: arrival.is_over)
        if not arrival.is_over:  # nobody has come
            there.vmm.exchange("PUT", "vm.cancel-migration")
        arrival.outcome(timeout_s=GUEST_S)
        self._judge(home, here, there)
        return True

    def _judge(self, home: Path, here: Server, there: Server) -> None:
        here.vmm.exchange("PUT", "vm.resize", {})  # comes behind what is to be finished
        states, told = (state_of(here), state_of(there)), outcome(home)
        self.outcomes.add(f"{told}: {states[0]} here, {states[1]} there")
        assert states != ("Running", "Running"), "The VM runs twice"
        if told == "unknown":
            assert states[0] == "Paused"
            assert states[1] in ("Running", None)
        elif told == "finished":
            assert states == (None, "Running")
        else:
            assert states == ("Running", None), (told, states)
        here.vmm.put("vm.delete")

    @contextlib.contextmanager
    def _mortal(self, home: Path, step: int) -> Iterator[tuple[Server, Plan]]:
        plans = home / "plans"
        plans.mkdir()
        flags = ["--no-shutdown", "--state-dir", str(home / "state")]
        with self._server(home / "here", *flags, program=("support.mortal", str(plans))) as server:
            make_image(home / "disk", MIB)
            disk = {"id": "d0", "path": str(home / "disk"), "image_type": "Raw"}
            server.vmm.put("vm.create", standing_config(self._engine, home, disks=[disk]))
            server.vmm.put("vm.boot")
            yield server, Plan(plans / "plan")

    @contextlib.contextmanager
    def _server(
        self, folder: Path, *flags: str, program: tuple[str, ...] = ("support.tapped",)
    ) -> Iterator[Server]:
        with checked(Server(folder, [*self._engine.flags, *flags], program=program)) as server:
            server.wait_ready()
            yield server


def state_of(server: Server) -> str | None:
    """Return that of the VM, None where there is none."""
    reply = server.vmm.exchange("GET", "vm.info")
    return msgspec.json.decode(reply.body)["state"] if reply.status == 200 else None


def outcome(home: Path) -> str | None:
    """Return what the manager has told of the migration."""
    lines = (home / "state" / "events").read_bytes().splitlines()[1:]
    events = [msgspec.json.decode(line) for line in lines]
    settled = [event["properties"] for event in events if event["event"] == "settled"]
    told = [
        each["outcome"] for each in settled if each["command"] == MIGRATION
    ]  # the end of the VMM is another
    return told[-1] if told else None
