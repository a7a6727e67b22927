"""Guests that firmware starts from a disk: UEFI by a boot script, BIOS by a boot sector."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.booted import Booted, booting, default_guest, serving, vm_config
from support.deadline import BOOT_S, GUEST_S
from support.fat import make_fat_disk
from support.machine_code import printing_boot_sector
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

OVMF = Path("/usr/share/ovmf/OVMF.fd")
SEABIOS = Path("/usr/share/seabios/bios-256k.bin")


def needs(path: Path, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"needs {path}, of Debian's package {package}")


@needs(OVMF, "ovmf")
def test_uefi_firmware_starts_the_kernel_that_its_script_names(tmp_path: Path) -> None:
    guest = default_guest()
    script = "FS0:\\BZIMAGE.EFI initrd=\\INITRD.IMG console=ttyS0 quiet no_timer_check panic=-1\r\n"
    disk = make_fat_disk(
        tmp_path / "esp.raw",
        {
            "STARTUP.NSH": script.encode(),
            "BZIMAGE.EFI": Path(guest.bzimage).read_bytes(),
            "INITRD.IMG": Path(guest.initramfs).read_bytes(),
        },
    )
    config = vm_config(
        payload={"firmware": str(OVMF)},
        disks=[{"path": str(disk), "image_type": "Raw", "readonly": True}],
        serial={"mode": "File", "file": str(tmp_path / "serial.log")},
    )
    with booting(tmp_path / "vm", config, shell=None) as vm:
        wait_serial(vm, tmp_path / "serial.log", b"cloudvmm-guest ready", timeout_s=BOOT_S)
        vm.open_shell()
        vm.wait_ready()
        assert vm.run("[ -d /sys/firmware/efi ] && cut -c -25 /proc/cmdline").startswith(
            "FS0:\\BZIMAGE.EFI initrd="
        )


@needs(SEABIOS, "seabios")
def test_bios_firmware_starts_the_boot_sector_of_the_first_disk(tmp_path: Path) -> None:
    first = tmp_path / "first.raw"
    first.write_bytes(printing_boot_sector(b"the first disk was started\r\n").ljust(1 << 20, b"\0"))
    second = tmp_path / "second.raw"
    second.write_bytes(printing_boot_sector(b"the second disk was started\r\n").ljust(1 << 20, b"\0"))
    config = vm_config(
        payload={"firmware": str(SEABIOS)},
        disks=[{"path": str(path), "image_type": "Raw"} for path in (first, second)],
        serial={"mode": "File", "file": str(tmp_path / "serial.log")},
        debug_console={"mode": "File", "file": str(tmp_path / "debug.log")},
    )
    with booting(tmp_path / "vm", config, shell=None) as vm:
        wait_serial(vm, tmp_path / "serial.log", b"disk was started\r\n", timeout_s=GUEST_S)
        assert (tmp_path / "serial.log").read_bytes().endswith(b"the first disk was started\r\n")
        assert (tmp_path / "debug.log").read_bytes() == b"the first disk was started\r\n"


def test_firmware_that_is_missing_fails_the_boot_and_can_be_shut_down(tmp_path: Path) -> None:
    config = vm_config(payload={"firmware": str(tmp_path / "absent.fd")})
    with serving(tmp_path / "vm") as vm:
        vm.vmm.put("vm.create", config)
        chain = vm.vmm.put("vm.boot", expect=500)
        assert chain[:2] == ["Error from API", "The VM could not boot"]
        assert "No such file" in chain[-1]
        assert vm.info()["state"] == "Created"
        assert vm.vmm.put("vm.boot", expect=500)[-1] == "VM is already created"
        vm.vmm.put("vm.shutdown")


def wait_serial(vm: Booted, path: Path, words: bytes, *, timeout_s: float) -> None:
    wait_until(lambda: words in path.read_bytes(), f"{words!r} on the serial port", timeout_s=timeout_s)
