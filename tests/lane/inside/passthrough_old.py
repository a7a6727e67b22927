"""Run inside the passthrough lane's machine: what the oldest supported QEMU does with its devices."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lane.device import Host, VdpaDisk, add, check_drive, remove
from lane.passthrough import NVME
from support.booted import booting, vm_config
from support.device.case import pci_folder
from support.old_qemu import old_qemu_program


def test_vfio_device_comes_and_goes_and_a_vdpa_device_is_refused(tmp_path: Path) -> None:
    Host().give(NVME, "vfio-pci")
    drive = {"id": "drive", "path": pci_folder(NVME)}
    config = vm_config(
        serial={"mode": "File", "file": str(tmp_path / "kernel.log")},
        devices=[drive],
    )
    flags = ("--qemu", str(old_qemu_program(tmp_path)))
    with (
        booting(tmp_path / "run", config, *flags) as vm,
        contextlib.closing(VdpaDisk("vd2", tmp_path)) as disk,
    ):
        check_drive(vm, "drive", mark="cold")
        remove(vm, "drive")
        add(vm, "vm.add-device", drive)
        check_drive(vm, "drive", mark="hot")
        before = vm.info()["config"]
        answer = vm.vmm.put("vm.add-vdpa", {"id": disk.name, "path": disk.path}, expect=500)
        assert answer[-1].startswith("vDPA devices need a QEMU with the device vhost-vdpa-device-pci")
        assert vm.info()["config"] == before
