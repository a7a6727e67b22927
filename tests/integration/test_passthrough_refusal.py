"""Devices of the host that cannot be had: the caller hears why, and VM and configuration stay as they were.

How devices work that can be had is seen in a machine that has some: `tests/lane/test_passthrough.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import Booted, booting, serving, vm_config
from support.shared import shared

pytestmark = [pytest.mark.qemu]

NO_VFIO = "Cannot create a VFIO device"
NO_VDPA = "Cannot create vdpa device"
LOOPBACK = "/sys/class/net/lo"  # a device, with no PCI around it

ROWS = [
    pytest.param(
        "vm.add-device", "/no/such/device", NO_VFIO, "There is no device /no/such/device", id="vfio-missing"
    ),
    pytest.param("vm.add-device", "/tmp", NO_VFIO, "/tmp is no device: a folder such as", id="vfio-folder"),
    pytest.param(
        "vm.add-device", "/dev/null", NO_VFIO, "/dev/null is no device: a folder such as", id="vfio-node"
    ),
    pytest.param(
        "vm.add-device", LOOPBACK, NO_VFIO, "The device lo is in no IOMMU group", id="vfio-no-iommu"
    ),
    pytest.param("vm.add-vdpa", "/no/such/device", NO_VDPA, "Failed to create vhost-vdpa", id="vdpa-missing"),
    pytest.param("vm.add-vdpa", "/tmp", NO_VDPA, "Failed to create vhost-vdpa", id="vdpa-folder"),
    pytest.param(
        "vm.add-vdpa",
        "/dev/null",
        NO_VDPA,
        "Get virtio device identifier: /dev/null is no vDPA device",
        id="vdpa-other",
    ),
]


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    with booting(tmp_path_factory.mktemp("vm") / "run", vm_config(), shell=None) as vm:
        yield vm


def assert_says(answer: list[str], *words: str) -> None:
    """Fail unless `answer` has entries that begin with `words`, in order."""
    found = iter(answer)
    assert all(any(entry.startswith(each) for entry in found) for each in words), answer


@pytest.mark.parametrize(("command", "path", "error", "cause"), ROWS)
def test_refused_device_leaves_the_vm_as_it_was(
    vm: Booted, command: str, path: str, error: str, cause: str
) -> None:
    before = vm.info()["config"], sorted(vm.info()["device_tree"]), open_files(vm.server.pid)
    answer = vm.vmm.put(command, {"path": path}, expect=500)
    assert_says(answer, error, cause)
    assert before == (vm.info()["config"], sorted(vm.info()["device_tree"]), open_files(vm.server.pid))


@pytest.mark.parametrize(("command", "path", "error", "cause"), ROWS)
def test_refused_device_keeps_the_vm_from_booting(
    tmp_path_factory: pytest.TempPathFactory, command: str, path: str, error: str, cause: str
) -> None:
    member = {"vm.add-device": "devices", "vm.add-vdpa": "vdpa"}[command]
    assert_boot_says(tmp_path_factory.mktemp("run") / "run", {member: [{"path": path}]}, error, cause)


@pytest.mark.skipif(os.path.exists("/dev/iommu"), reason="This host has iommufd")
def test_host_without_iommufd_is_told(tmp_path: Path) -> None:
    platform = {"platform": {"iommufd": True}}
    assert_boot_says(tmp_path / "run", platform, "Cannot create iommufd", "Failed to open /dev/iommu")


def assert_boot_says(folder: Path, changes: dict[str, Any], *words: str) -> None:
    with serving(folder) as refused:
        refused.vmm.put("vm.create", vm_config(**changes))
        answer = refused.vmm.put("vm.boot", expect=500)
        assert_says(answer, *words)
        assert refused.info()["state"] == "Created"


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
