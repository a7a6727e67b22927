"""Random walks through a VM's life: at each step the server says and has what the model does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.bench import texts
from support.model import BLOCK, DONE, HOTPLUG, MAX_VCPUS, MIB, RAM, TOLD, Model, Said, picture_of
from support.rest import Reply
from support.server import Server
from support.vm import EngineChoice, choose_engine

STEPS = 50
LONG = bool(os.environ.get("CLOUDVMM_LONG"))
# Behind these QEMU has a state to give that it has not given.
BEGINNINGS = ("vm.create", "vm.boot", "vm.reboot", "vm.restore", "vm.resume", "vm.shutdown", "vm.delete")
WALKS = {"fake": 300 if LONG else 40, "qemu": 12 if LONG else 2}  # 10,000 and 500 steps in the long run
MOST_DISKS = 6
NAMES = st.sampled_from(["a", "b", "_disk0", "_disk1", "_disk3"])
MAYBE_NAMES = st.none() | NAMES


def _same(name: str | None) -> object:
    """Tell names apart; each disk without one is like no other."""
    return object() if name is None else name


DISKS = st.lists(st.none() | NAMES, max_size=2, unique_by=_same)


class Life:
    """Owns the server that all walks use, one after the other."""

    def __init__(self, engine: EngineChoice, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self.server = Server(folder / "server", engine.flags)
        self.server.wait_ready()
        self.vmm = self.server.vmm
        self._files = 0

    def new_path(self) -> Path:
        self._files += 1
        return self.folder / f"file{self._files}"

    def disk(self, name: str | None) -> dict[str, Any]:
        path = self.new_path()
        path.write_bytes(bytes(MIB))
        disk = {"path": str(path), "image_type": "Raw"}
        return disk if name is None else {**disk, "id": name}

    def config(self, vcpus: int, names: list[str | None]) -> dict[str, Any]:
        return {
            "cpus": {"boot_vcpus": vcpus, "max_vcpus": MAX_VCPUS},
            "memory": {"size": RAM, "hotplug_method": "VirtioMem", "hotplug_size": HOTPLUG},
            "payload": self.engine.payload(self.folder),
            "disks": [self.disk(name) for name in names],
            "console": {"mode": "Null"},
            "serial": {"mode": "Null"},
        }

    def info(self) -> dict[str, Any] | None:
        reply = self.vmm.exchange("GET", "vm.info")
        return None if reply.status == 404 else msgspec.json.decode(reply.body)


def walk_of(life: Life) -> type[RuleBasedStateMachine]:
    """Return the machine whose rules are the calls."""
    # Whether and when a real guest lets go of a device or a vCPU is its own affair; one that stands does not.
    lets_go_in = {"Created", "Running"} if life.engine.name == "fake" else {"Created"}

    gives_states_once = life.engine.name == "qemu"
    has_vm = precondition(lambda walk: walk.model.vm is not None)
    has_none = precondition(lambda walk: walk.model.vm is None)
    is_alive = precondition(lambda walk: walk.model.is_alive)
    is_idle = precondition(lambda walk: not walk.model.is_alive)

    class Walk(RuleBasedStateMachine):
        """A call that must be refused is made now and then, so that most steps lead somewhere.

        A guest that was saved and has changed since is not saved before it has run: QEMU gives a state once.
        """

        def __init__(self) -> None:
            super().__init__()
            self.model = Model()
            self.is_saved = self.is_spent = False
            self.folders: list[Path] = []
            life.vmm.put("vm.delete")

        @initialize(vcpus=st.integers(1, MAX_VCPUS), names=DISKS)
        def begin(self, vcpus: int, names: list[str | None]) -> None:
            self.create(vcpus, names)

        @has_none
        @rule(vcpus=st.integers(1, MAX_VCPUS), names=DISKS)
        def create(self, vcpus: int, names: list[str | None]) -> None:
            self.says(self.model.create(vcpus, list(names)), "vm.create", life.config(vcpus, names))

        @is_idle
        @rule()
        def boot(self) -> None:
            self.says(self.model.boot(), "vm.boot")

        @is_alive
        @rule()
        def pause(self) -> None:
            self.says(self.model.pause(), "vm.pause")

        @is_alive
        @rule()
        def resume(self) -> None:
            self.says(self.model.resume(), "vm.resume")

        @is_alive
        @rule()
        def shutdown(self) -> None:
            self.says(self.model.shutdown(), "vm.shutdown")

        @is_alive
        @rule()
        def reboot(self) -> None:
            self.says(self.model.reboot(), "vm.reboot")

        @precondition(lambda walk: walk.model.vm is None or len(walk.model.vm.disks) > 1 or walk.folders)
        @rule()
        def delete(self) -> None:
            self.says(self.model.delete(), "vm.delete")

        @is_alive
        @rule(command=st.sampled_from(["vm.nmi", "vm.power-button", "vm.counters", "vm.coredump"]))
        def ask(self, command: str) -> None:
            if command == "vm.counters":
                self.says(self.model.asks_the_living(TOLD), command, method="GET")
                return
            body = {"destination_url": f"file://{life.new_path()}"} if command == "vm.coredump" else None
            self.says(self.model.asks_the_living(DONE), command, body)

        @precondition(lambda walk: walk.model.vm is not None and len(walk.model.vm.disks) < MOST_DISKS)
        @rule(name=MAYBE_NAMES)
        def add_disk(self, name: str | None) -> None:
            said, given = self.model.add_disk(name)
            reply = self.says(said, "vm.add-disk", life.disk(name))
            if given is not None:
                assert msgspec.json.decode(reply.body)["id"] == given

        @precondition(lambda walk: walk.model.vm is not None and walk.model.vm.state in lets_go_in)
        @rule(name=NAMES)
        def remove(self, name: str) -> None:
            self.says(self.model.remove(name), "vm.remove-device", {"id": name})

        @has_vm
        @rule(name=NAMES)
        def resize_disk(self, name: str) -> None:
            self.says(self.model.resize_disk(name), "vm.resize-disk", {"id": name, "desired_size": MIB})

        @has_vm
        @rule(vcpus=st.integers(0, MAX_VCPUS + 1))
        def resize_vcpus(self, vcpus: int) -> None:
            vm = self.model.vm
            if vm is not None and vm.state == "Created":
                vcpus = min(max(vcpus, 1), MAX_VCPUS)  # what is no count of vCPUs shows at the boot only
            elif vm is not None and vm.state not in lets_go_in and 0 < vcpus < vm.vcpus:
                vcpus = vm.vcpus
            self.says(self.model.resize_vcpus(vcpus), "vm.resize", {"desired_vcpus": vcpus})

        @has_vm
        @rule(room=st.sampled_from([-BLOCK, 0, BLOCK, 3 * BLOCK, HOTPLUG, HOTPLUG + BLOCK]))
        def resize_memory(self, room: int) -> None:
            vm = self.model.vm
            size = (RAM if vm is None or not vm.is_alive else vm.memory) + room
            self.says(self.model.resize_memory(size), "vm.resize", {"desired_ram": size})

        @is_alive
        @rule()
        def snapshot(self) -> None:
            if self.is_spent and gives_states_once:
                return
            folder = life.new_path()
            folder.mkdir()
            if (
                self.says(
                    self.model.snapshot(), "vm.snapshot", {"destination_url": f"file://{folder}"}
                ).status
                == 204
            ):
                self.folders.append(folder)

        @precondition(lambda walk: walk.model.vm is None and walk.folders)
        @rule(data=st.data())
        def restore(self, data: st.DataObject) -> None:
            self._restore(data.draw(st.integers(0, len(self.folders) - 1)))

        def _restore(self, number: int) -> None:
            body = {"source_url": f"file://{self.folders[number]}"}
            self.says(self.model.restore(number), "vm.restore", body)

        @has_vm
        @rule(
            call=st.sampled_from(
                ["create", "boot", "restore", "pause", "resume", "shutdown", "reboot", "snapshot"]
            )
        )
        def ask_out_of_place(self, call: str) -> None:
            """Make a call that may well be refused in this state."""
            if call == "create":
                self.create(1, [])
            elif call != "restore":
                getattr(self, call)()
            elif self.folders:
                self._restore(0)

        @has_none
        @rule(
            call=st.sampled_from(
                ["boot", "pause", "shutdown", "reboot", "snapshot", "add", "remove", "resize"]
            )
        )
        def ask_for_what_is_not_there(self, call: str) -> None:
            match call:
                case "add":
                    self.add_disk(None)
                case "remove":
                    self.remove("a")
                case "resize":
                    self.resize_vcpus(1)
                    self.resize_disk("a")
                case _:
                    getattr(self, call)()

        @invariant()
        def looks_alike(self) -> None:
            assert picture_of(life.info()) == self.model.picture()

        def says(self, said: Said, command: str, body: Any = None, *, method: str = "PUT") -> Reply:
            reply = life.vmm.exchange(method, command, body)
            assert reply.status == said.status, texts(reply)
            if said.sentence:
                assert texts(reply)[-1] == said.sentence
            self._note(command, is_done=reply.status < 300)
            return reply

        def _note(self, command: str, *, is_done: bool) -> None:
            if command in BEGINNINGS:
                self.is_saved = self.is_saved and not is_done
            elif command == "vm.snapshot":
                self.is_saved = self.is_saved or is_done
                return
            self.is_spent = self.is_saved

    return Walk


@contextmanager
def living(engine: EngineChoice, folder: Path) -> Iterator[Life]:
    life = Life(engine, folder)
    try:
        yield life
    finally:
        life.server.check_end()


@pytest.mark.parametrize("engine", ["fake", pytest.param("qemu", marks=pytest.mark.qemu)])
def test_server_and_model_agree_at_each_step(engine: str, tmp_path: Path) -> None:
    with living(choose_engine(engine), tmp_path) as life:
        run_state_machine_as_test(
            walk_of(life),
            settings=settings(
                max_examples=WALKS[engine],
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )
