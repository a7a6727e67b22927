"""What a VMM does with what the last one on its folder wrote, where no machine is left of that."""

from __future__ import annotations

import os
import shutil
import socket
from typing import Any

import msgspec
import pytest

from cloudvmm import api
from cloudvmm.api.data import VmState
from cloudvmm.config.disk import DiskConfig
from cloudvmm.engine.base import Adopted
from cloudvmm.engine.fake import FakeEngine
from support.deadline import HOST_S

from .conftest import Caller


class AskedEngine(FakeEngine):
    """One that tells whether it was asked for a machine that another process has left."""

    was_asked = False

    def adopt(self, state_dir):
        self.was_asked = True
        return super().adopt(state_dir)


@pytest.fixture
def left_by(tmp_path):
    """Return the folder of a VMM as it is now: what one that is killed leaves."""

    def copy(name: str) -> str:
        shutil.copytree(tmp_path / "state", tmp_path / name)
        return str(tmp_path / name)

    return copy


def test_vm_whose_machine_is_gone_is_off_with_its_config(tmp_path, vm_config, left_by):
    first = Caller(FakeEngine(), state_dir=str(tmp_path / "state"), no_shutdown=True)
    first(api.vm_create, vm_config)
    first(api.vm_boot)
    before = first(api.vm_info).config
    second = Caller(FakeEngine(), state_dir=left_by("copy"), no_shutdown=True)
    info = second(api.vm_info)

    assert info.state is VmState.CREATED
    assert info.config.disks == before.disks
    assert "error: The VM of the last VMM is gone" in second.logged
    second(api.vm_boot)
    first.close()
    second.close()


def test_config_that_was_never_booted_is_there_still(tmp_path, vm_config, left_by):
    first = Caller(FakeEngine(), state_dir=str(tmp_path / "state"))
    first(api.vm_create, vm_config)
    second = Caller(FakeEngine(), state_dir=left_by("copy"))

    assert second(api.vm_info).state is VmState.CREATED
    first.close()
    second.close()


def test_folder_whose_vm_was_deleted_has_none(tmp_path, vm_config, left_by):
    first = Caller(FakeEngine(), state_dir=str(tmp_path / "state"))
    first(api.vm_create, vm_config)
    first(api.vm_delete)
    second = Caller(FakeEngine(), state_dir=left_by("copy"))

    assert second.refusal(api.vm_info)[-1] == "VM is not created"
    first.close()
    second.close()


def test_state_that_cannot_be_read_ends_the_vmm_and_touches_nothing(tmp_path):
    (tmp_path / "vm").write_text("{")
    caller = Caller(FakeEngine(), state_dir=str(tmp_path))
    caller.vmm.join(HOST_S)

    assert "cannot be read" in str(caller.vmm.failure)
    assert (tmp_path / "vm").read_text() == "{"


@pytest.mark.parametrize(("left", "is_asked"), [(None, False), ("machine", True)])
def test_engine_is_asked_for_a_machine_only_where_something_may_be_of_it(tmp_path, left, is_asked):
    engine = AskedEngine()
    Caller(engine, state_dir=str(tmp_path)).close()
    assert not engine.was_asked
    if left is not None:
        (tmp_path / left).touch()
    caller = Caller(engine, state_dir=str(tmp_path))
    caller.refusal(api.vm_info)

    assert engine.was_asked is is_asked
    caller.close()


class HeirEngine(AskedEngine):
    """One that takes over the machine of another engine, from which the device `lost` has gone."""

    def __init__(self, machine, device_ids, lost, *, is_running=True):
        super().__init__()
        self._adopted = Adopted(
            machine, is_running=is_running, kept_fds={}, device_ids=device_ids - {lost}, vcpus=1, modules=()
        )

    def adopt(self, state_dir):
        return self._adopted


def test_device_that_only_the_machine_knew_to_be_gone_is_told_of_and_dropped(tmp_path, vm_config, left_by):
    engine = FakeEngine()
    first = Caller(engine, state_dir=str(tmp_path / "state"), no_shutdown=True)
    vm_config.disks = [*(vm_config.disks or []), DiskConfig(id="lost", path="/dev/null")]
    first(api.vm_create, vm_config)
    first(api.vm_boot)
    tree = first(api.vm_info).device_tree
    folder = left_by("copy")
    (tmp_path / "copy" / "machine").touch()
    second = Caller(HeirEngine(engine.last_machine, frozenset(tree), "lost"), state_dir=folder)

    assert "lost" in tree
    assert second(api.vm_info).device_tree.keys() == tree.keys() - {"lost", "_virtio-pci-lost"}
    told = second.vmm.events.since(0, limit=100)
    assert [event.properties["id"] for event in told if event.event == "device-removed"] == ["lost"]
    second.close()
    first.close()


def test_no_guest_runs_and_no_device_comes_that_the_next_vmm_would_not_know_of(tmp_path, vm_config):
    engine = FakeEngine()
    engine.outlives_manager = True
    caller = Caller(engine, state_dir=str(tmp_path), no_shutdown=True)
    caller(api.vm_create, vm_config)
    blocker = tmp_path / "vm.new"

    blocker.mkdir()
    refusal = caller.refusal(api.vm_boot)
    assert "What a VMM after this one has to know could not be written" in refusal
    assert caller(api.vm_info).state is VmState.CREATED
    assert caller(api.vm_info).device_tree is None
    blocker.rmdir()
    caller(api.vm_boot)

    (tmp_path / "disk").write_bytes(bytes(512))
    blocker.mkdir()
    disk = DiskConfig(id="more", path=str(tmp_path / "disk"))
    refusal = caller.refusal(api.vm_add_disk, disk)
    assert "What a VMM after this one has to know could not be written" in refusal
    assert "more" not in caller(api.vm_info).device_tree
    blocker.rmdir()
    caller(api.vm_add_disk, disk)
    assert "more" in caller(api.vm_info).device_tree
    caller.close()


@pytest.fixture
def heir_of_paused(tmp_path, vm_config):
    """Return who takes over a VM that stands still, from one that has written these members of its ledger."""
    engine = FakeEngine()
    first = Caller(engine, state_dir=str(tmp_path / "state"), no_shutdown=True)
    first(api.vm_create, vm_config)
    first(api.vm_boot)
    first(api.vm_pause)
    device_ids = frozenset(first(api.vm_info).device_tree)
    made = []

    def make(*, unfinished: str = "", **ledger: object) -> Caller:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "state", copy)
        (copy / "machine").touch()
        add_to_ledger(str(copy), **ledger)
        if unfinished:
            entry = {"at": 0.0, "command": unfinished, "phase": "begin"}
            with open(copy / "journal", "ab") as journal:
                journal.write(msgspec.json.encode(entry) + b"\n")
        heir = HeirEngine(engine.last_machine, device_ids, "nothing", is_running=False)
        made.append(Caller(heir, state_dir=str(copy), no_shutdown=True))
        # Comes behind what is to be finished.
        made[-1].refusal(api.vm_resize, api.VmResizeData(desired_vcpus=0))
        return made[-1]

    make.machine, make.folder = engine.last_machine, str(tmp_path / "copy")
    yield make
    for caller in (*made, first):
        caller.close()


@pytest.mark.parametrize(
    ("arrived", "state"), [(None, None), ("Paused", VmState.PAUSED), ("Running", VmState.RUNNING)]
)
def test_vm_that_was_arriving_stays_where_its_sender_has_let_go_of_it(
    tmp_path, heir_of_paused, arrived, state
):
    url = {"receiver_url": f"unix:{tmp_path}/way"}
    under_way = {"command": "vm.receive-migration", "data": url}
    with socket.socket(socket.AF_UNIX) as way:
        way.bind(f"{tmp_path}/way")
    second = heir_of_paused(under_way=under_way, arrived=arrived)

    assert state_of(second) is state
    assert outcomes(second) == ["rolled back" if state is None else "finished"]
    assert not os.path.lexists(tmp_path / "way")


@pytest.mark.parametrize(
    ("is_given", "has_left", "state", "outcome"),
    [
        (False, False, VmState.RUNNING, "rolled back"),
        (True, False, VmState.PAUSED, "unknown"),
        (True, True, None, "finished"),
    ],
)
def test_vm_that_was_leaving_goes_on_unless_the_other_vmm_may_have_it(
    heir_of_paused, is_given, has_left, state, outcome
):
    lent = {"state": "Running", "is_given": is_given, "has_left": has_left}
    heir = heir_of_paused(lent=lent, unfinished="outgoing migration")

    assert state_of(heir) is state
    assert outcomes(heir) == [outcome]


@pytest.mark.parametrize(
    ("command", "data"),
    [
        ("vm.receive-migration", {"receiver_url": "unix:/nowhere"}),
        ("vm.receive-migration", {"receiver_url": "tcp:nowhere"}),
        ("vm.restore", {"source_url": "file:///nowhere", "resume": True}),
    ],
)
def test_vm_stays_as_it_is_where_another_was_about_to_be_refused(heir_of_paused, command, data):
    under_way = {"command": command, "state": "Paused", "has_config": True, "data": data}
    heir = heir_of_paused(under_way=under_way, unfinished=command)

    assert state_of(heir) is VmState.PAUSED
    assert outcomes(heir) == ["rolled back"]


def test_config_stays_where_a_restore_beside_it_was_about_to_be_refused(tmp_path, vm_config, left_by):
    first = Caller(FakeEngine(), state_dir=str(tmp_path / "state"), no_shutdown=True)
    first(api.vm_create, vm_config)
    folder = left_by("copy")
    add_to_ledger(folder, under_way={"command": "vm.restore", "has_config": True})
    second = Caller(FakeEngine(), state_dir=folder, no_shutdown=True)
    second.refusal(api.vm_pause)  # behind what is to be finished

    assert second(api.vm_info).state is VmState.CREATED
    first.close()
    second.close()


@pytest.mark.parametrize(
    "command", ["vm.delete", "vm.shutdown", "vm.reboot", "guest reset", "guest power-off"]
)
def test_vm_that_another_vmm_may_have_is_not_touched_by_what_waited_for_it(heir_of_paused, command):
    lent = {"state": "Running", "is_given": True, "has_left": False}
    heir = heir_of_paused(lent=lent, under_way={"command": command, "state": "Paused"}, unfinished=command)

    assert state_of(heir) is VmState.PAUSED
    assert sorted(outcomes(heir)) == ["rolled back", "unknown"]


@pytest.mark.parametrize("arrived", ["Paused", "Running"])
def test_nobody_says_that_an_arrival_is_rolled_back_whose_sender_may_have_let_go_of_it(
    tmp_path, vm_config, left_by, arrived
):
    first = Caller(FakeEngine(), state_dir=str(tmp_path / "state"), no_shutdown=True)
    first(api.vm_create, vm_config)
    first(api.vm_boot)
    folder = left_by("copy")
    add_to_ledger(folder, under_way={"command": "vm.receive-migration"}, arrived=arrived)
    second = Caller(FakeEngine(), state_dir=folder, no_shutdown=True)

    assert second(api.vm_info).state is VmState.CREATED
    assert outcomes(second) == ["unknown"]
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("job", "ledger"),
    [
        ("resume", {"under_way": {"command": "vm.receive-migration"}, "arrived": "Running"}),
        (
            "resume",
            {"under_way": {"command": "vm.restore", "data": {"source_url": "file:///s", "resume": True}}},
        ),
        ("resume", {"lent": {"state": "Running", "is_given": False, "has_left": False}}),
        ("close", {"lent": {"state": "Running", "is_given": True, "has_left": True}}),
    ],
)
def test_vmm_that_is_killed_while_it_finishes_leaves_what_it_found(heir_of_paused, job, ledger):
    machine, found = heir_of_paused.machine, []
    carry_out = getattr(machine, job)

    def look(*args, **options):
        found.append(written_in(heir_of_paused.folder))
        return carry_out(*args, **options)

    setattr(machine, job, look)
    heir = heir_of_paused(**ledger)
    after = written_in(heir_of_paused.folder)

    assert len(outcomes(heir)) == 1
    for member, value in ledger.items():
        assert (
            value.items() <= found[0][member].items()
            if isinstance(value, dict)
            else found[0][member] == value
        )
        assert after[member] is None


def written_in(folder: str) -> dict[str, Any]:
    """Return the ledger in `folder`."""
    with open(f"{folder}/vm", "rb") as file:
        return msgspec.json.decode(file.read())


def add_to_ledger(folder: str, **members: object) -> None:
    written = {**written_in(folder), **members}
    with open(f"{folder}/vm", "wb") as file:
        file.write(msgspec.json.encode(written))


def state_of(caller: Caller) -> VmState | None:
    try:
        return caller(api.vm_info).state
    except api.ApiError:
        return None


def outcomes(caller: Caller) -> list[str]:
    """Return what is told of what was under way when the last VMM ended."""
    told = caller.vmm.events.since(0, limit=100)
    return [event.properties["outcome"] for event in told if event.event == "settled"]
