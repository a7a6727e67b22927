"""vCPUs and RAM: what the guest finds, and what the process that holds them looks like to the host."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, serving, vm_config
from support.deadline import GUEST_S
from support.shared import shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

RAM_BYTES = 160 * MIB
HUGEPAGE_BYTES = 2 * MIB
HUGEPAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest with 2 packages of 2 cores and an unusual amount of RAM."""
    topology = {"threads_per_core": 1, "cores_per_die": 2, "dies_per_package": 1, "packages": 2}
    config = vm_config(
        cpus={"boot_vcpus": 4, "max_vcpus": 4, "topology": topology}, memory={"size": 211 * MIB}
    )
    with booting(tmp_path_factory.mktemp("four"), config) as booted:
        yield booted


def test_guest_has_all_its_vcpus_at_work(vm: Booted) -> None:
    assert vm.run("nproc; cat /sys/devices/system/cpu/online") == "4\n0-3"


def test_guest_sees_packages_and_cores_of_the_topology(vm: Booted) -> None:
    script = """
        for n in 0 1 2 3; do
            cd /sys/devices/system/cpu/cpu$n/topology
            echo $(cat physical_package_id core_id)
        done
    """
    assert vm.run(script) == "0 0\n0 1\n1 0\n1 1"


def test_guest_has_its_ram_and_info_says_so(vm: Booted) -> None:
    script = """
        cd /sys/firmware/memmap
        for n in *; do
            [ "$(cat $n/type)" != "System RAM" ] || echo $(cat $n/start $n/end)
        done
    """
    ranges = [line.split() for line in vm.run(script).splitlines()]
    ram_bytes = sum(int(end, 16) - int(start, 16) + 1 for start, end in ranges)
    assert 210 * MIB <= ram_bytes <= 211 * MIB
    assert vm.info()["memory_actual_size"] == 211 * MIB


def test_fewer_vcpus_than_max_leave_the_rest_absent(tmp_path: Path) -> None:
    with booting(tmp_path, vm_config(cpus={"boot_vcpus": 1, "max_vcpus": 3})) as vm:
        assert vm.run("cat /sys/devices/system/cpu/present /sys/devices/system/cpu/possible") == "0\n0-2"


def test_ram_is_a_memfd_that_others_can_share(tmp_path: Path) -> None:
    with started(tmp_path, {"shared": True}) as vm:
        ram = ram_mapping(vm.qemu_pid())
        assert "memfd:" in ram["name"]
        assert ram["permissions"].endswith("s")


def test_prefault_makes_all_of_the_ram_resident_before_boot_returns(tmp_path: Path) -> None:
    with started(tmp_path, {"prefault": True}) as vm:
        assert resident_bytes(vm) == RAM_BYTES


def test_ram_that_nobody_touched_is_not_resident_without_prefault(tmp_path: Path) -> None:
    with started(tmp_path, {}) as vm:
        vm.vmm.put("vm.pause")
        assert resident_bytes(vm) < RAM_BYTES


@pytest.mark.skipif(not Path("/sys/kernel/mm/ksm").exists(), reason="needs a kernel with KSM")
def test_mergeable_ram_is_private_and_open_to_ksm(tmp_path: Path) -> None:
    with started(tmp_path, {"mergeable": True}) as vm:
        ram = ram_mapping(vm.qemu_pid())
        assert ram["permissions"].endswith("p")
        assert "mg" in ram["VmFlags"].split()


def test_ram_is_closed_to_ksm_unless_mergeable(tmp_path: Path) -> None:
    with started(tmp_path, {}) as vm:
        assert "mg" not in ram_mapping(vm.qemu_pid())["VmFlags"].split()


@pytest.mark.parametrize(("thp", "enabled"), [(True, "1"), (False, "0")])
def test_transparent_huge_pages_are_off_for_the_process_that_asks_so(
    tmp_path: Path, thp: bool, enabled: str
) -> None:
    with started(tmp_path, {"thp": thp}) as vm:
        status = Path(f"/proc/{vm.qemu_pid()}/status").read_text()
        assert re.findall(r"THP_enabled:\s*(\d)", status) == [enabled]


def test_balloon_takes_its_size_from_the_guest_and_info_follows(tmp_path: Path) -> None:
    config = vm_config(memory={"size": RAM_BYTES}, balloon={"size": 48 * MIB})
    with booting(tmp_path, config) as vm:
        wait_until(
            lambda: vm.info()["memory_actual_size"] == RAM_BYTES - 48 * MIB,
            "the balloon is filled",
            timeout_s=GUEST_S,
        )
        total_kib = int(vm.run("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"))
        assert total_kib * 1024 < RAM_BYTES - 48 * MIB
        assert vm.config()["memory"]["size"] == RAM_BYTES


@pytest.fixture
def reserved_hugepages() -> Iterator[None]:
    """Enough free pages of 2 MiB for one VM; the machine's number is put back afterwards."""
    wanted = RAM_BYTES // HUGEPAGE_BYTES
    counter = HUGEPAGES / "nr_hugepages"
    before = int(counter.read_text()) if counter.exists() else 0
    free = int((HUGEPAGES / "free_hugepages").read_text()) if counter.exists() else 0
    try:
        counter.write_text(str(before + max(0, wanted - free)))
        if int((HUGEPAGES / "free_hugepages").read_text()) < wanted:
            pytest.skip(f"The machine does not give {wanted} huge pages of 2 MiB")
        yield
        counter.write_text(str(before))
    except OSError as error:
        pytest.skip(f"Huge pages cannot be reserved: {error}")


@pytest.mark.root
def test_guest_runs_on_huge_pages(reserved_hugepages: None, tmp_path: Path) -> None:
    memory = {"size": RAM_BYTES, "hugepages": True, "hugepage_size": HUGEPAGE_BYTES, "prefault": True}
    free_before = int((HUGEPAGES / "free_hugepages").read_text())
    with booting(tmp_path, vm_config(memory=memory)) as vm:
        assert ram_mapping(vm.qemu_pid())["KernelPageSize"] == "2048 kB"
        used = free_before - int((HUGEPAGES / "free_hugepages").read_text())
        assert used == RAM_BYTES // HUGEPAGE_BYTES
        assert vm.run("nproc") == "1"
    assert int((HUGEPAGES / "free_hugepages").read_text()) == free_before


def test_huge_pages_of_a_size_the_machine_lacks_are_refused(tmp_path: Path) -> None:
    memory = {"size": 3 * 64 * MIB, "hugepages": True, "hugepage_size": 64 * MIB}
    with serving(tmp_path) as vm:
        vm.vmm.put("vm.create", vm_config(memory=memory))
        chain = vm.vmm.put("vm.boot", expect=500)
        assert chain[:2] == ["Error from API", "The VM could not boot"]
        assert "Guest memory could not be made" in chain


def started(folder: Path, memory: dict[str, Any]) -> contextlib.AbstractContextManager[Booted]:
    """Boot a VM, and do not wait for its guest: what is asked is seen from outside."""
    return booting(folder, vm_config(memory={"size": RAM_BYTES, **memory}), shell=None)


def resident_bytes(vm: Booted) -> int:
    return int(ram_mapping(vm.qemu_pid())["Rss"].split()[0]) * 1024


def ram_mapping(pid: int) -> dict[str, str]:
    """Return what smaps says of the mapping that is as large as the guest's RAM."""
    found: dict[str, str] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+\s*(.*)", line):
            if found:
                return found
            is_ram = int(header[2], 16) - int(header[1], 16) == RAM_BYTES
            current = {"permissions": header[3], "name": header[4]}
            found = current if is_ram else {}
        elif found:
            key, _, value = line.partition(":")
            found[key] = value.strip()
    assert found, f"No mapping of {RAM_BYTES} bytes"
    return found
