"""Ids and slots never clash, whatever comes and goes: the VMM on the fake engine beside a small model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudvmm import api
from cloudvmm.config.device import FsConfig
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.net import NetConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.fake import FakeEngine
from support.wait import wait_until

from .conftest import DEADLINE_S, Caller

NAMES = ["mine", "_disk0", "_disk1", "_net1", "_disk3", "_fs2"]
KINDS = {"disk": "_disk", "net": "_net", "fs": "_fs"}
FIRST, LAST = 1, 31

device_id = st.none() | st.sampled_from(NAMES)
slot = st.none() | st.integers(1, 6)
addition = st.tuples(st.just("add"), st.sampled_from(sorted(KINDS)), device_id, slot)
removal = st.tuples(st.just("remove"), st.integers(0, 5))
reboot = st.tuples(st.just("reboot"))


class Model:
    """What the reference says of names and slots, for devices that are let go of at once.

    `slots` is in order of creation, `given` the ids that the user had given when the machine was built.
    """

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.wanted: dict[str, int | None] = {}
        self.given: set[str] = set()
        self.counter = 0

    def add(self, kind: str, wanted_id: str | None, wanted_slot: int | None) -> tuple[str, int] | None:
        """Return the id and slot that it must get, None where it must be refused."""
        if wanted_id is not None and wanted_id in self.slots:
            return None
        found = wanted_id
        while found is None:
            name = f"{KINDS[kind]}{self.counter}"
            self.counter += 1
            if name not in self.slots and name not in self.given:
                found = name
        free = [each for each in range(FIRST, LAST + 1) if each not in self.slots.values()]
        if not free or (wanted_slot is not None and wanted_slot not in free):
            return None
        self.slots[found] = free[0] if wanted_slot is None else wanted_slot
        self.wanted[found] = wanted_slot
        return found, self.slots[found]

    def remove(self, name: str) -> None:
        del self.slots[name], self.wanted[name]

    def reboot(self, order: list[str]) -> None:
        """Build anew: every id is given by now, and what asks for a slot is served first."""
        self.counter, self.given = 0, set(order) - {"__rng"}
        self.slots = {name: self.wanted[name] or 0 for name in order}
        for name in order:
            if not self.slots[name]:
                taken = set(self.slots.values())
                self.slots[name] = next(each for each in range(FIRST, LAST + 1) if each not in taken)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    return str(path)


def told_slots(caller: Caller) -> dict[str, int]:
    tree = caller(api.vm_info).device_tree
    nodes = [node for node in tree.values() if node.pci_bdf is not None]
    return {(node.children or [node.id])[0]: int(node.pci_bdf[8:10], 16) for node in nodes}


def add(caller: Caller, kind: str, name: str | None, wanted: int | None, image: str) -> dict[str, str]:
    common = {"id": name, "pci_device_id": wanted}
    match kind:
        case "disk":
            answer = caller(api.vm_add_disk, DiskConfig(path=image, readonly=True, **common))
        case "net":
            answer = caller(api.vm_add_net, NetConfig(**common))
        case _:
            answer = caller(api.vm_add_fs, FsConfig(tag="t", socket="/s", **common))
    return msgspec.json.decode(answer)


def creation_order(config: VmConfig) -> list[str]:
    disks, nets = ([each.id for each in devices or []] for devices in (config.disks, config.net))
    return [*disks, *nets, "__rng", *(each.id for each in config.fs or [])]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example has a VMM of its own
    derandomize=True,
)
@given(steps=st.lists(addition | removal | reboot, max_size=14))
def test_ids_and_slots_are_the_models_after_any_steps(image: str, vm_config: VmConfig, steps: list) -> None:
    vm_config.memory.shared = True
    caller, model = Caller(FakeEngine()), Model()
    model.slots, model.wanted = {"__rng": FIRST}, {"__rng": None}
    try:
        caller(api.vm_create, vm_config)
        caller(api.vm_boot)
        for step, *values in steps:
            if step == "add":
                carry_out_addition(caller, model, image, *values)
            elif step == "remove":
                carry_out_removal(caller, model, *values)
            else:
                caller(api.vm_reboot)
                model.reboot(creation_order(caller(api.vm_info).config))
            assert told_slots(caller) == model.slots
            assert len(set(model.slots.values())) == len(model.slots)
    finally:
        caller.close()


def carry_out_addition(
    caller: Caller, model: Model, image: str, kind: str, name: str | None, wanted: int | None
) -> None:
    expected = model.add(kind, name, wanted)
    if expected is None:
        with pytest.raises(api.ApiError):
            add(caller, kind, name, wanted, image)
        return
    assert add(caller, kind, name, wanted, image) == {
        "id": expected[0],
        "bdf": f"0000:00:{expected[1]:02x}.0",
    }


def carry_out_removal(caller: Caller, model: Model, which: int) -> None:
    """Remove one of those that can go, if there is any, and wait until the guest has let go of it."""
    removable = [name for name in model.slots if name != "__rng"]
    if not removable:
        return
    name = removable[which % len(removable)]
    caller(api.vm_remove_device, api.VmRemoveDeviceData(id=name))
    wait_until(lambda: name not in told_slots(caller), f"{name} is gone", timeout_s=DEADLINE_S)
    model.remove(name)
