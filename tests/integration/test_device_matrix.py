"""Each kind of device through its life: booted, rebooted, removed, added again, added while paused, restored.

Every step is seen from inside a real guest, on the QEMU of the path and on the newest there is. On the oldest
that is supported each kind is booted, removed and added again; its whole life there is a long test.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import Booted, booting, vm_config
from support.device.case import GUEST_S, DeviceCase, pci_folder
from support.device.cases import CASES
from support.namespace import network_namespace
from support.qemu import VERSIONS, find_qemu, version_of
from support.shared import Shared, shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

OLDEST = "7.2"
ROWS = [
    pytest.param(
        (case, version),
        marks=pytest.mark.long if version == OLDEST else (),
        id=f"{case.name}-{version}",
    )
    for case in CASES
    for version in VERSIONS
]


class Stage:
    """A guest that was booted with one device of `case`, called "one"."""

    def __init__(self, vm: Booted, case: DeviceCase) -> None:
        self.vm = vm
        self.case = case

    def bdf(self, device_id: str) -> str:
        tree = self.vm.info()["device_tree"]
        (found,) = (
            node["pci_bdf"]
            for node in tree.values()
            if "pci_bdf" in node and device_id in (node["id"], *node["children"])
        )
        return str(found)

    def check(self, device_id: str) -> None:
        """Fail unless the guest has the device where `vm.info` says."""
        self.case.check(self.vm, device_id, self.bdf(device_id))

    def add(self, device_id: str) -> None:
        answer = self.vm.vmm.put(self.case.command, self.case.device(device_id), expect=200)
        assert answer == {"id": device_id, "bdf": self.bdf(device_id)}

    def remove(self, device_id: str) -> None:
        bdf, before = self.bdf(device_id), self.removals(device_id)
        self.vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
        assert device_id not in self.configured()
        wait_until(
            lambda: self.removals(device_id) == before + 1, f"{device_id} is removed", timeout_s=GUEST_S
        )
        assert device_id not in self.vm.info()["device_tree"]
        assert self.vm.run(f"test ! -e {pci_folder(bdf)} && echo gone") == "gone"

    def remove_or_see_why_not(self) -> None:
        if self.case.stays is None:
            self.remove("one")
            return
        answer = self.vm.vmm.put("vm.remove-device", {"id": "one"}, expect=500)
        assert self.case.stays in answer[-1]
        assert self.configured() == ["one"]
        self.check("one")

    def add_again(self) -> None:
        """Add the device under its old id; under another where the old one stays."""
        device_id = "one" if self.case.stays is None else "two"
        if device_id in self.configured():
            self.remove(device_id)
        self.add(device_id)
        self.check(device_id)

    def removals(self, device_id: str) -> int:
        return sum(
            event["event"] == "device-removed" and event["properties"]["id"] == device_id
            for event in self.vm.events.documents()
        )

    def configured(self) -> list[str]:
        found: Any = self.vm.config().get(self.case.member) or []
        return [device["id"] for device in ([found] if isinstance(found, dict) else found)]

    def reboot(self) -> None:
        self.case.before_reboot()
        self.vm.vmm.put("vm.reboot")
        self.vm.wait_ready()


@contextlib.contextmanager
def staged(kind: type[DeviceCase], version: str, folder: Path) -> Iterator[Stage]:
    """Boot a guest with one device of `kind` on the QEMU of `version`."""
    qemu = find_qemu(version, folder)
    if kind.oldest > version_of(qemu):
        pytest.skip(f"{kind.name} needs QEMU {kind.oldest}: its refusal is tested elsewhere")
    with network_namespace(), contextlib.closing(kind(folder)) as case:
        device = case.device("one")
        config = vm_config(**case.changes, **{case.member: device if case.is_single else [device]})
        with booting(folder / "run", config, "--qemu", qemu) as vm:
            yield Stage(vm, case)


@shared("class", params=ROWS)
def shared_stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    kind, version = request.param
    with staged(kind, version, tmp_path_factory.mktemp(kind.name)) as stage:
        yield stage


@pytest.fixture
def stage(shared_stage: Shared[Stage], request: pytest.FixtureRequest) -> Stage:
    return shared_stage.lend(request)


class TestLifeOfADevice:
    """The steps build on each other; one that finds the guest just booted, after a failure, catches up."""

    def test_works_from_the_boot_on(self, stage: Stage) -> None:
        stage.check("one")

    def test_works_after_a_reboot(self, stage: Stage) -> None:
        stage.reboot()
        stage.check("one")

    def test_is_removed_or_the_refusal_says_why(self, stage: Stage) -> None:
        stage.remove_or_see_why_not()

    def test_is_added_again_under_its_id(self, stage: Stage) -> None:
        stage.add_again()

    def test_is_added_while_the_guest_is_paused(self, stage: Stage) -> None:
        device_id = "one" if stage.case.stays is None else "three"
        if stage.case.stays is None:
            stage.remove("one")
        stage.vm.vmm.put("vm.pause")
        stage.add(device_id)
        stage.vm.vmm.put("vm.resume")
        stage.check(device_id)

    def test_added_device_works_after_a_reboot(self, stage: Stage) -> None:
        stage.reboot()
        for device_id in stage.configured():
            stage.check(device_id)

    def test_goes_on_from_a_snapshot_or_the_refusal_says_why(self, stage: Stage) -> None:
        stage.vm.vmm.put("vm.pause")
        url = f"file://{tempfile.mkdtemp(dir=stage.case.folder)}"
        answer = stage.vm.vmm.exchange("PUT", "vm.snapshot", {"destination_url": url})
        assert (answer.status == 204) == (stage.case.unsaved is None), answer.body
        if stage.case.unsaved is None:
            stage.case.before_reboot()
            stage.vm.vmm.put("vm.delete")
            stage.vm.vmm.put("vm.restore", {"source_url": url}, expect=204)
            stage.vm.open_shell()
        else:
            assert stage.case.unsaved in answer.body.decode()
        stage.vm.vmm.put("vm.resume")
        for device_id in stage.configured():
            stage.check(device_id)


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.name)
def test_oldest_qemu_boots_removes_and_adds_it_again(kind: type[DeviceCase], tmp_path: Path) -> None:
    """A sample of the life above."""
    with staged(kind, OLDEST, tmp_path) as stage:
        stage.check("one")
        stage.remove_or_see_why_not()
        stage.add_again()
