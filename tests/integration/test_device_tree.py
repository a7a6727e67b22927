"""What `vm.info` says of PCI devices is what the guest says: addresses, kinds, BARs, whatever comes and goes.

One VM has a device of every kind of the matrix and of those that are never added; each step of its life is
followed by the same comparison. A bus with more devices than slots is looked at on the QEMU of the path and
on the newest; on the oldest it is a long test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from support.booted import Booted, booting, make_image, vm_config
from support.device.case import GUEST_S, DeviceCase
from support.device.cases import CASES
from support.namespace import network_namespace
from support.pci import BOARD, guest_functions, told_bars, told_nodes
from support.qemu import SAMPLED_VERSIONS, VERSIONS, find_qemu, version_of
from support.shared import Shared, shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

VIRTIO_VENDOR, FIRST_VIRTIO_DEVICE = 0x1AF4, 0x1040
# The number of the virtio specification for what each member of a configuration describes.
VIRTIO_TYPES: Final = {
    "net": 1,
    "disks": 2,
    "console": 3,
    "rng": 4,
    "balloon": 5,
    "vsock": 19,
    "fs": 26,
    "pmem": 27,
}
FIXED_IDS: Final = {"console": "__console", "rng": "__rng", "balloon": "__balloon"}
PLAIN: Final = {"__watchdog": (0x8086, 0x25AB), "__pvpanic": (0x1B36, 0x0011)}


class Stage:
    """A VM with one device of each of `cases`, called as its kind is."""

    def __init__(self, vm: Booted, cases: list[DeviceCase]) -> None:
        self.vm = vm
        self.cases = cases

    def check(self) -> None:
        """Fail unless guest and `vm.info` agree, as soon as the guest has placed its BARs."""
        told, seen = told_nodes(self.vm), guest_functions(self.vm)
        assert set(told) == set(seen) - BOARD
        for address, node in told.items():
            device_id = (node["children"] or [node["id"]])[0]
            function = seen[address]
            assert (function.vendor, function.device) == self.hardware(device_id, function), device_id
            if node["children"] and function.virtio is not None:
                assert function.device == FIRST_VIRTIO_DEVICE + function.virtio
        wait_until(self.bars_agree, "the BARs in vm.info are the guest's", timeout_s=GUEST_S)

    def bars_agree(self) -> bool:
        seen = guest_functions(self.vm)
        return all(told_bars(node) == seen[address].bars for address, node in told_nodes(self.vm).items())

    def hardware(self, device_id: str, seen: Any) -> tuple[int, int]:
        """Return vendor and device as the configuration has them; as `seen` where a back end decides."""
        if device_id in PLAIN:
            return PLAIN[device_id]
        for member, devices in self.vm.config().items():
            ids = [each.get("id", FIXED_IDS.get(member)) for each in listed(devices)]
            if device_id in ids and member in VIRTIO_TYPES:
                return VIRTIO_VENDOR, FIRST_VIRTIO_DEVICE + VIRTIO_TYPES[member]
        return seen.vendor, seen.device

    def remove(self, device_id: str) -> None:
        self.vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
        wait_until(
            lambda: device_id not in self.vm.info()["device_tree"],
            f"{device_id} is removed",
            timeout_s=GUEST_S,
        )

    def add(self, case: DeviceCase, device_id: str, **changes: Any) -> None:
        answer = self.vm.vmm.put(case.command, case.device(device_id) | changes, expect=200)
        assert (
            device_id in (node := told_nodes(self.vm)[answer["bdf"]])["children"] or device_id == node["id"]
        )
        folder = f"/sys/bus/pci/devices/{answer['bdf']}"
        self.vm.run(f"until test -e {folder}/resource; do usleep 20000; done", timeout_s=GUEST_S)


def listed(devices: Any) -> list[dict[str, Any]]:
    found = [devices] if isinstance(devices, dict) else devices
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def full_config(cases: list[DeviceCase]) -> dict[str, Any]:
    config = vm_config(
        rng={"src": "/dev/urandom", "pci_device_id": 30},
        balloon={"size": 0},
        watchdog=True,
        pvpanic=True,
    )
    for case in cases:
        for member, value in case.changes.items():
            before = config.get(member)
            config[member] = {**before, **value} if isinstance(before, dict) else value
        device = case.device(case.name)
        config[case.member] = device if case.is_single else [*config.get(case.member, []), device]
    return config


@shared("class", params=VERSIONS)
def shared_stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder: Path = tmp_path_factory.mktemp("tree")
    qemu = find_qemu(request.param, folder)
    with network_namespace(), contextlib.ExitStack() as cleanup:
        cases: list[DeviceCase] = []
        for kind in CASES:
            if kind.oldest <= version_of(qemu):
                (own := folder / kind.name).mkdir()
                cases.append(cleanup.enter_context(contextlib.closing(kind(own))))
        with booting(folder / "run", full_config(cases), "--qemu", qemu) as vm:
            yield Stage(vm, cases)


@pytest.fixture
def stage(shared_stage: Shared[Stage], request: pytest.FixtureRequest) -> Stage:
    return shared_stage.lend(request)


class TestDeviceTree:
    """The steps build on each other; one that finds the VM just booted, after a failure, catches up."""

    def test_is_the_guests_after_the_boot(self, stage: Stage) -> None:
        stage.check()
        assert "0000:00:1e.0" in told_nodes(stage.vm)

    def test_is_the_guests_after_removals(self, stage: Stage) -> None:
        for case in stage.cases:
            if case.stays is None:
                stage.remove(case.name)
        stage.check()

    def test_is_the_guests_after_additions_with_and_without_a_slot_given(self, stage: Stage) -> None:
        for number, case in enumerate(stage.cases):
            if case.stays is None:
                if case.name in stage.vm.info()["device_tree"]:
                    stage.remove(case.name)
                wanted = {"pci_device_id": 29 - number} if number % 2 else {}
                stage.add(case, f"hot-{case.name}", **wanted)
        stage.check()

    def test_is_the_guests_after_a_reboot(self, stage: Stage) -> None:
        before = {address: node["id"] for address, node in told_nodes(stage.vm).items()}
        for case in stage.cases:
            case.before_reboot()
        stage.vm.vmm.put("vm.reboot")
        stage.vm.wait_ready()
        stage.check()
        assert sorted(before.values()) == sorted(node["id"] for node in told_nodes(stage.vm).values())


MANY = 40
DISK_BYTES = 64 * 1024


@shared("class", params=SAMPLED_VERSIONS)
def shared_crowd(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Booted]:
    """A VM with more disks than its bus has slots."""
    folder: Path = tmp_path_factory.mktemp("crowd")
    disks = [
        {"path": str(make_image(folder / f"{number}.raw", DISK_BYTES)), "serial": f"number-{number}"}
        for number in range(MANY)
    ]
    with booting(folder / "run", vm_config(disks=disks), "--qemu", find_qemu(request.param, folder)) as vm:
        yield vm


@pytest.fixture
def crowd(shared_crowd: Shared[Booted], request: pytest.FixtureRequest) -> Booted:
    return shared_crowd.lend(request)


class TestMoreDevicesThanSlots:
    def test_all_are_there_at_the_addresses_that_are_told(self, crowd: Booted) -> None:
        told = {node["children"][0]: address for address, node in told_nodes(crowd).items()}
        assert set(told.values()) == set(guest_functions(crowd)) - BOARD
        script = "cd /sys/bus/pci/devices; for d in *; do echo $d $(cat $d/virtio*/block/*/serial); done"
        lines = crowd.run(f"({script}) 2>/dev/null").splitlines()
        seen = dict(line.split() for line in lines if " " in line.strip())
        assert seen == {told[f"_disk{number}"]: f"number-{number}" for number in range(MANY)}
        assert told["_disk28"] == "0000:00:1f.0"
        assert told["_disk29"] == "0000:00:02.1"

    def test_none_is_added_and_the_vm_is_as_before(self, crowd: Booted, tmp_path: Path) -> None:
        before = crowd.config(), told_nodes(crowd).keys(), guest_functions(crowd).keys()
        image = make_image(tmp_path / "more.raw", DISK_BYTES)
        answer = crowd.vmm.put("vm.add-disk", {"path": str(image)}, expect=500)
        assert answer[2:] == [
            "Error from device manager",
            "Failed to find an available PCI device ID",
            "Could not find an available device slot on the PCI bus",
        ]
        assert (crowd.config(), told_nodes(crowd).keys(), guest_functions(crowd).keys()) == before

    def test_one_with_a_slot_of_its_own_is_removed_and_its_slot_used_again(
        self, crowd: Booted, tmp_path: Path
    ) -> None:
        answer = crowd.vmm.put("vm.remove-device", {"id": "_disk39"}, expect=500)
        assert "shares its PCI slot with others" in answer[-1]
        crowd.vmm.put("vm.remove-device", {"id": "_disk28"}, expect=204)
        wait_until(lambda: "_disk28" not in crowd.info()["device_tree"], "it is gone", timeout_s=GUEST_S)
        image = make_image(tmp_path / "next.raw", DISK_BYTES)
        answer = crowd.vmm.put("vm.add-disk", {"path": str(image), "serial": "next"}, expect=200)
        assert answer["bdf"] == "0000:00:1f.0"
        serial = "/sys/bus/pci/devices/0000:00:1f.0/virtio*/block/*/serial"
        assert (
            crowd.run(f"until cat {serial} 2>/dev/null; do usleep 20000; done", timeout_s=GUEST_S) == "next"
        )

    def test_all_are_there_after_a_reboot(self, crowd: Booted) -> None:
        told = set(told_nodes(crowd))
        crowd.vmm.put("vm.reboot")
        crowd.wait_ready()
        assert set(told_nodes(crowd)) == told == set(guest_functions(crowd)) - BOARD
