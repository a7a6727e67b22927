"""The virtual IOMMU, in a guest whose kernel has its driver: Debian's generic one, fetched on first use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudvmm.guest import FAST_CMDLINE
from cloudvmm.guest.error import GuestBuildError
from lane.kernel import fetch_kernel, guest_on
from support.booted import MIB, Booted, booting, default_guest, make_image, vm_config
from support.deadline import GUEST_S
from support.device.case import pci_folder
from support.shared import shared

pytestmark = [pytest.mark.qemu, pytest.mark.root]

VIRTIO_F_ACCESS_PLATFORM = 33


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest with disks before and behind the vIOMMU, one of them on a segment of its own."""
    folder = tmp_path_factory.mktemp("iommu")
    config = vm_config(
        payload=generic_payload(folder),
        platform={"num_pci_segments": 2, "iommu_segments": [1], "iommu_address_width_bits": 40},
        disks=[
            disk(folder, "before"),
            disk(folder, "behind", iommu=True),
            disk(folder, "aside", iommu=True, pci_segment=1),
        ],
    )
    with booting(folder / "run", config) as booted:
        yield booted


def generic_payload(folder: Path) -> dict[str, str]:
    guest = default_guest()
    try:
        generic = guest_on(fetch_kernel(), guest, folder)
    except GuestBuildError as error:
        pytest.skip(f"The generic kernel cannot be had: {error}")
    return {"kernel": generic.kernel, "initramfs": generic.initramfs, "cmdline": FAST_CMDLINE}


def disk(folder: Path, name: str, **members: Any) -> dict[str, Any]:
    image = make_image(folder / f"{name}.raw", 4 * MIB)
    image.write_bytes(name.encode().ljust(4 * MIB, b"\0"))
    return {"id": name, "path": str(image), "image_type": "Raw", **members}


def bdf(vm: Booted, device_id: str) -> str:
    return str(vm.info()["device_tree"][f"_virtio-pci-{device_id}"]["pci_bdf"])


def goes_through_iommu(vm: Booted, address: str) -> bool:
    """Say whether the guest's driver agreed to reach its memory the way of the platform."""
    bits = vm.run(f"cat {pci_folder(address)}/virtio*/features")
    return bits[VIRTIO_F_ACCESS_PLATFORM] == "1"


def text_on(vm: Booted, address: str, size: int) -> str:
    name = vm.run(f"ls {pci_folder(address)}/virtio*/block")
    return vm.run(f"head -c {size} /dev/{name}")


def test_guest_has_the_iommu_where_vm_info_says(vm: Booted) -> None:
    assert vm.config()["iommu"] is True
    assert vm.run(f"cat {pci_folder(bdf(vm, '__iommu'))}/device") == "0x1057"
    assert vm.run(f"basename $(readlink {pci_folder(bdf(vm, '__iommu'))}/virtio*/driver)") == "virtio_iommu"
    assert "input address: 40 bits" in vm.run("dmesg")


@pytest.mark.parametrize(("name", "behind"), [("before", False), ("behind", True), ("aside", True)])
def test_just_those_are_behind_it_that_the_configuration_says(vm: Booted, name: str, behind: bool) -> None:
    address = bdf(vm, name)
    assert goes_through_iommu(vm, address) is behind
    assert vm.run(f"test -e {pci_folder(address)}/iommu_group && echo group") == "group"
    assert text_on(vm, address, len(name)) == name


def test_disk_is_added_behind_it_on_a_segment_that_is_there_for_it(vm: Booted, tmp_path: Path) -> None:
    added = vm.vmm.put("vm.add-disk", disk(tmp_path, "added", iommu=True, pci_segment=1), expect=200)
    folder = pci_folder(added["bdf"])
    vm.run(f"until ls {folder}/virtio*/block 2>/dev/null; do usleep 20000; done", timeout_s=GUEST_S)
    assert goes_through_iommu(vm, added["bdf"])
    assert text_on(vm, added["bdf"], 5) == "added"


def test_disk_cannot_be_added_behind_it_on_segment_0(vm: Booted, tmp_path: Path) -> None:
    answer = vm.vmm.put("vm.add-disk", disk(tmp_path, "refused", iommu=True), expect=500)
    assert answer[-1] == "Cannot hotplug device behind vIOMMU"
