"""What the machine says it is, and what guest and machine do to each other: watchdog, panic, NMI, power."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.booted import Booted, booting, direct_boot, vm_config
from support.deadline import GUEST_S
from support.shared import shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

BOOT = ["vm/booting", "vm/booted"]
REBOOT = ["vm/rebooting", "vm/rebooted"]
PLATFORM = {
    "system_manufacturer": "Maker, Inc.",
    "system_product_name": "a product",
    "system_version": "v 1",
    "system_serial_number": "serial=7",
    "system_uuid": "11111111-2222-3333-4444-555555555555",
    "system_sku_number": "sku-3",
    "system_family": "family",
    "chassis_asset_tag": "asset",
    "oem_strings": ["first=1", "second, with a comma"],
}
DMI = {
    "sys_vendor": "Maker, Inc.",
    "product_name": "a product",
    "product_version": "v 1",
    "product_serial": "serial=7",
    "product_uuid": "11111111-2222-3333-4444-555555555555",
    "product_sku": "sku-3",
    "product_family": "family",
    "chassis_asset_tag": "asset",
}


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest with two vCPUs on a machine that gives itself a name."""
    config = vm_config(cpus={"boot_vcpus": 2, "max_vcpus": 2}, platform=PLATFORM)
    with booting(tmp_path_factory.mktemp("platform"), config) as booted:
        yield booted


def test_every_field_of_the_platform_is_in_the_guests_dmi(vm: Booted) -> None:
    script = f"cd /sys/class/dmi/id; for name in {' '.join(DMI)}; do echo $name=$(cat $name); done"
    assert dict(line.split("=", 1) for line in vm.run(script).splitlines()) == DMI


def test_oem_strings_are_in_the_guests_smbios_table(vm: Booted) -> None:
    assert vm.run("strings /sys/firmware/dmi/tables/DMI").count("first=1") == 1
    assert "second, with a comma" in vm.run("strings /sys/firmware/dmi/tables/DMI").splitlines()


def test_machine_without_a_platform_calls_itself_as_the_reference_does(tmp_path: Path) -> None:
    with booting(tmp_path, vm_config()) as plain:
        names = plain.run("cd /sys/class/dmi/id; cat sys_vendor product_name").splitlines()
        assert names == ["Cloud Hypervisor", "cloud-hypervisor"]
        plain.tell("poweroff")
        assert plain.server.wait_end() == 0
        assert plain.events.names("vm", "vmm") == [
            "vmm/starting",
            *BOOT,
            "vm/shutdown",
            "vm/deleted",
            "vmm/shutdown",
        ]


def test_nmi_arrives_where_the_guest_listens_for_it(vm: Booted) -> None:
    # QEMU raises LINT1 of every vCPU; Linux lets that through on the first one alone.
    before = nmi_counts(vm)
    vm.vmm.put("vm.nmi")
    wait_until(lambda: nmi_counts(vm)[0] > before[0], "the first vCPU has seen an NMI", timeout_s=GUEST_S)
    assert "NMI received for unknown reason" in vm.run("dmesg")


def nmi_counts(vm: Booted) -> list[int]:
    """Return how many NMIs each vCPU has seen."""
    return [int(word) for word in vm.run("grep NMI: /proc/interrupts").split()[1:3]]


# Program the timer of the i6300esb from user space: it has two stages of 0x100 milliseconds, and any write to
# its registers is preceded by 0x80 and 0x86 on the reload register. Byte 0x68 of its PCI space starts it.
START_WATCHDOG = """
cd /sys/bus/pci/devices/{bdf}
echo 1 >enable
read -r base rest <resource
unlock() {{ devmem $((base + 12)) 16 0x80; devmem $((base + 12)) 16 0x86; }}
unlock; devmem $base 32 0x100
unlock; devmem $((base + 4)) 32 0x100
unlock; devmem $((base + 12)) 16 0x100
printf '\\002' | dd of=config bs=1 seek=104 conv=notrunc
"""


def test_watchdog_that_nobody_feeds_reboots_the_guest(tmp_path: Path) -> None:
    config = vm_config(watchdog=True, payload=direct_boot("iomem=relaxed"))
    with booting(tmp_path, config) as vm:
        address = vm.info()["device_tree"]["__watchdog"]["pci_bdf"]
        assert vm.run(f"cat /sys/bus/pci/devices/{address}/vendor /sys/bus/pci/devices/{address}/device") == (
            "0x8086\n0x25ab"
        )
        vm.run(START_WATCHDOG.format(bdf=address) + "true")
        vm.events.wait("vm/rebooted")
        vm.wait_ready()
        assert vm.events.names("vm") == [*BOOT, *REBOOT]
        assert vm.info()["state"] == "Running"


def test_panic_is_told_and_the_guests_own_reset_follows(tmp_path: Path) -> None:
    with booting(tmp_path, vm_config(pvpanic=True)) as vm:
        assert "pci_bdf" in vm.info()["device_tree"]["__pvpanic"]
        vm.tell("echo c >/proc/sysrq-trigger")
        vm.events.wait("vm/rebooted")
        panics = [
            document["properties"] for document in vm.events.documents() if document["source"] == "guest"
        ]
        assert panics == [{"event": "panic"}]
        vm.wait_ready()
        assert vm.events.names("vm", "guest") == [*BOOT, "guest/panic", *REBOOT]


def test_guests_own_reboot_gives_a_fresh_guest_and_its_events(tmp_path: Path) -> None:
    with booting(tmp_path, vm_config()) as vm:
        vm.run("touch /tmp/before")
        qemu = vm.qemu_pid()
        vm.tell("reboot -f")
        vm.events.wait("vm/rebooted")
        vm.wait_ready()
        assert vm.run("ls /tmp/before 2>/dev/null || echo gone") == "gone"
        assert vm.events.names("vm") == [*BOOT, *REBOOT]
        assert vm.info()["state"] == "Running"
        assert vm.qemu_pid() != qemu


def test_power_button_shuts_the_guest_down_and_no_shutdown_keeps_the_vmm(tmp_path: Path) -> None:
    with booting(tmp_path, vm_config(), "--no-shutdown") as vm:
        vm.vmm.put("vm.power-button")
        vm.events.wait("vm/shutdown", timeout_s=GUEST_S)
        wait_until(lambda: vm.info()["state"] == "Created", "the VM is off", timeout_s=GUEST_S)
        assert vm.events.names("vm", "vmm") == ["vmm/starting", *BOOT, "vm/shutdown"]
        assert not [child for child in vm.server.children() if "qemu" in child.command]
        vm.vmm.put("vm.boot")
        vm.open_shell()
        vm.wait_ready()


def test_power_off_by_the_guest_ends_the_vmm_with_status_0(tmp_path: Path) -> None:
    with booting(tmp_path, vm_config()) as vm:
        vm.tell("poweroff -f")
        assert vm.server.wait_end() == 0
        assert vm.events.names("vm", "vmm") == [
            "vmm/starting",
            *BOOT,
            "vm/shutdown",
            "vm/deleted",
            "vmm/shutdown",
        ]
