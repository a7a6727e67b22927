"""Disks, network devices, the entropy device and their PCI places, seen from inside the guest."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, direct_boot, make_image, serving, vm_config
from support.deadline import GUEST_S, HOST_S
from support.namespace import ip, network_namespace, open_tap, ping
from support.shared import shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

DISK_BYTES = 8 * MIB
IORESOURCE_IO, IORESOURCE_PREFETCH, IORESOURCE_MEM_64 = 0x100, 0x2000, 0x100000  # of Linux


@pytest.fixture(scope="module")
def namespace() -> Iterator[None]:
    with network_namespace():
        ip("tuntap add name existing0 mode tap")
        ip("addr add 192.168.9.1/24 dev existing0")
        yield


@shared()
def shared_vm(namespace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest with every kind of disk and network device."""
    folder = tmp_path_factory.mktemp("devices")
    with booting(folder, full_config(folder)) as booted:
        yield booted


def full_config(folder: Path) -> dict[str, Any]:
    raw = make_image(folder / "a.raw", DISK_BYTES)
    raw.write_bytes(b"A" * MIB + bytes(DISK_BYTES - MIB))
    base = make_image(folder / "base.raw", DISK_BYTES)
    base.write_bytes(b"base" + bytes(DISK_BYTES - 4))
    plain = make_qcow2(folder / "plain.qcow2", size_bytes=DISK_BYTES)
    overlay = make_qcow2(folder / "overlay.qcow2", base=base)
    return vm_config(
        cpus={"boot_vcpus": 2, "max_vcpus": 2},
        disks=[
            {"path": str(raw), "image_type": "Raw", "serial": "raw-one", "num_queues": 2},
            {"path": str(plain), "image_type": "Qcow2", "id": "plain", "pci_device_id": 17},
            {"path": str(overlay), "image_type": "Qcow2", "backing_files": True, "readonly": True},
        ],
        net=[
            {"tap": "made0", "ip": "192.168.8.1", "mask": "255.255.255.0", "mac": "12:34:56:78:90:01"},
            {"tap": "existing0", "mtu": 1400, "num_queues": 2},
            {
                "tap": "pairs0",
                "ip": "192.168.7.1",
                "mask": "255.255.255.0",
                "num_queues": 4,
                "id": "pairs",
                "host_mac": "12:34:56:78:90:aa",
            },
        ],
        rng={"src": "/dev/urandom", "pci_device_id": 30},
    )


def make_qcow2(path: Path, *, size_bytes: int = 0, base: Path | None = None) -> Path:
    arguments = [] if base is None else ["-b", str(base), "-F", "raw"]
    size = [str(size_bytes)] if base is None else []
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *arguments, str(path), *size], check=True, timeout=HOST_S
    )
    return path


def block_device(vm: Booted, device_id: str) -> str:
    """Return the guest's name of the disk, found by its PCI address."""
    return vm.run(f"ls /sys/bus/pci/devices/{bdf(vm, device_id)}/virtio*/block")


def interface(vm: Booted, device_id: str) -> str:
    return vm.run(f"ls /sys/bus/pci/devices/{bdf(vm, device_id)}/virtio*/net")


def bdf(vm: Booted, device_id: str) -> str:
    return vm.info()["device_tree"][f"_virtio-pci-{device_id}"]["pci_bdf"]


def counters(vm: Booted, device_id: str) -> dict[str, int]:
    return vm.vmm.get("vm.counters")[device_id]


def test_ids_are_numbered_over_all_kinds_but_given_ones_are_kept(vm: Booted) -> None:
    config = vm.config()
    assert [disk["id"] for disk in config["disks"]] == ["_disk0", "plain", "_disk1"]
    assert [net["id"] for net in config["net"]] == ["_net2", "_net3", "pairs"]


def test_disk_shows_its_size_serial_queues_and_content(vm: Booted) -> None:
    name = block_device(vm, "_disk0")
    assert vm.run(f"cat /sys/block/{name}/size /sys/block/{name}/serial") == f"{DISK_BYTES // 512}\nraw-one"
    assert vm.run(f"ls /sys/block/{name}/mq") == "0\n1"
    assert vm.run(f"dd if=/dev/{name} bs=4 count=1 2>/dev/null") == "AAAA"


def test_direct_read_moves_the_counters_by_its_exact_bytes(vm: Booted) -> None:
    name = block_device(vm, "_disk0")
    before = counters(vm, "_disk0")
    vm.run(f"dd if=/dev/{name} of=/dev/null bs=65536 count=16 skip=4 iflag=direct")
    after = counters(vm, "_disk0")
    assert after["read_bytes"] - before["read_bytes"] == 16 * 65536
    assert after["read_ops"] - before["read_ops"] == 16
    assert after["write_bytes"] == before["write_bytes"]
    assert 0 < after["read_latency_min"] <= after["read_latency_avg"] <= after["read_latency_max"]


def test_direct_write_reaches_the_image_and_the_counters(vm: Booted) -> None:
    name = block_device(vm, "_disk0")
    before = counters(vm, "_disk0")
    vm.run(f"tr '\\0' W </dev/zero | dd of=/dev/{name} bs=4096 count=3 seek=512 iflag=fullblock oflag=direct")
    after = counters(vm, "_disk0")
    assert after["write_bytes"] - before["write_bytes"] == 3 * 4096
    assert after["write_ops"] - before["write_ops"] == 3
    image = (vm.folder / "a.raw").read_bytes()
    assert image[2 * MIB : 2 * MIB + 3 * 4096] == b"W" * 3 * 4096
    assert image[2 * MIB + 3 * 4096 :] == bytes(DISK_BYTES - 2 * MIB - 3 * 4096)


def test_qcow2_disk_grows_as_the_guest_writes(vm: Booted) -> None:
    name = block_device(vm, "plain")
    assert vm.run(f"cat /sys/block/{name}/size") == str(DISK_BYTES // 512)
    before = (vm.folder / "plain.qcow2").stat().st_size
    vm.run(f"echo written | dd of=/dev/{name} bs=512 conv=sync,fsync 2>/dev/null")
    assert (
        vm.run(f"dd if=/dev/{name} bs=7 count=1 iflag=direct 2>/dev/null || head -c 7 /dev/{name}")
        == "written"
    )
    assert (vm.folder / "plain.qcow2").stat().st_size > before


def test_overlay_shows_its_backing_file_and_cannot_be_written_when_readonly(vm: Booted) -> None:
    name = block_device(vm, "_disk1")
    assert vm.run(f"cat /sys/block/{name}/ro; head -c 4 /dev/{name}") == "1\nbase"
    status, _ = vm.shell.run(f"echo x | dd of=/dev/{name} bs=512 conv=sync,fsync", timeout_s=GUEST_S)
    assert status != 0


def test_overlay_without_backing_files_allowed_is_refused(tmp_path: Path) -> None:
    base = make_image(tmp_path / "base.raw", DISK_BYTES)
    overlay = make_qcow2(tmp_path / "overlay.qcow2", base=base)
    disk = {"path": str(overlay), "image_type": "Qcow2"}
    with serving(tmp_path / "vm") as server:
        server.vmm.put("vm.create", vm_config(disks=[disk]))
        chain = server.vmm.put("vm.boot", expect=500)
        assert chain[:2] == ["Error from API", "The VM could not boot"]
        assert str(base) in chain[-1]
        assert server.info()["state"] == "Created"


def test_created_tap_carries_the_given_mac_and_packets_both_ways(vm: Booted) -> None:
    name = interface(vm, "_net2")
    assert vm.run(f"cat /sys/class/net/{name}/address") == "12:34:56:78:90:01"
    vm.run(f"ifconfig {name} 192.168.8.2 netmask 255.255.255.0 up && ping -c 3 -W 10 192.168.8.1")
    ping("192.168.8.2")


def test_existing_tap_keeps_its_address_and_tells_its_mtu(vm: Booted) -> None:
    name = interface(vm, "_net3")
    assert vm.run(f"cat /sys/class/net/{name}/mtu") == "1400"
    assert "192.168.9.1/24" in ip("addr show existing0")
    assert "mtu 1400" in ip("link show existing0")
    assert vm.config()["net"][1]["mac"] == vm.run(f"cat /sys/class/net/{name}/address")
    vm.run(f"ifconfig {name} 192.168.9.2 netmask 255.255.255.0 up && ping -c 3 -W 10 192.168.9.1")
    ping("192.168.9.2")


def test_host_mac_is_the_taps_and_not_the_guests(vm: Booted) -> None:
    assert "12:34:56:78:90:aa" in ip("link show pairs0")
    assert vm.config()["net"][2]["mac"] == vm.run(f"cat /sys/class/net/{interface(vm, 'pairs')}/address")


def test_two_queue_pairs_are_there_and_work(vm: Booted) -> None:
    name = interface(vm, "pairs")
    assert vm.run(f"ls /sys/class/net/{name}/queues") == "rx-0\nrx-1\ntx-0\ntx-1"
    vm.run(f"ifconfig {name} 192.168.7.2 netmask 255.255.255.0 up && ping -c 3 -W 10 192.168.7.1")
    ping("192.168.7.2")


def test_net_counters_count_what_the_guest_counts(vm: Booted) -> None:
    name = interface(vm, "_net2")
    vm.run(f"ifconfig {name} 192.168.8.2 netmask 255.255.255.0 up && ping -c 1 -W 10 192.168.8.1")
    # What the host sent before the guest listened is in the one count and not in the other.
    inside, outside = guest_counts(vm, name), vmm_counts(vm)
    vm.run("ping -c 5 -s 1000 -W 10 192.168.8.1 && arping -c 3 -I " + name + " 192.168.8.99 || true")

    def moved() -> tuple[list[int], list[int]]:
        return differences(guest_counts(vm, name), inside), differences(vmm_counts(vm), outside)

    wait_until(
        lambda: len(set(map(tuple, moved()))) == 1, "the VMM counts what the guest counts", timeout_s=GUEST_S
    )
    received_bytes, received_frames, sent_bytes, sent_frames = moved()[0]
    assert received_bytes >= 5 * 1000
    # The address requests that nobody answers are sent alone.
    assert sent_frames >= received_frames + 3
    assert sent_bytes > received_bytes


def guest_counts(vm: Booted, name: str) -> list[int]:
    files = "rx_bytes rx_packets tx_bytes tx_packets"
    return [int(word) for word in vm.run(f"cd /sys/class/net/{name}/statistics && cat {files}").split()]


def vmm_counts(vm: Booted) -> list[int]:
    seen = counters(vm, "_net2")
    return [seen[key] for key in ("rx_bytes", "rx_frames", "tx_bytes", "tx_frames")]


def differences(after: list[int], before: list[int]) -> list[int]:
    return [now - then for now, then in zip(after, before, strict=True)]


def test_entropy_device_gives_bytes_that_differ(vm: Booted) -> None:
    assert vm.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    script = "dd if=/dev/hwrng bs=32 count=1 2>/dev/null | hexdump -v"
    assert vm.run(script) != vm.run(script)


def test_guests_pci_addresses_are_those_of_the_device_tree(vm: Booted) -> None:
    tree = vm.info()["device_tree"]
    listed = {node["pci_bdf"] for node in tree.values() if "pci_bdf" in node}
    assert tree["_virtio-pci-plain"]["pci_bdf"] == "0000:00:11.0"
    assert tree["_virtio-pci-__rng"]["pci_bdf"] == "0000:00:1e.0"
    virtio = vm.run("for d in /sys/bus/pci/devices/*/virtio*; do d=${d%/*}; echo ${d##*/}; done")
    assert set(virtio.split()) == listed
    kinds = {"__console": "0x1043", "_disk0": "0x1042", "_net2": "0x1041", "__rng": "0x1044"}
    found = {name: vm.run(f"cat /sys/bus/pci/devices/{bdf(vm, name)}/device") for name in kinds}
    assert found == kinds


def test_automatic_slots_are_the_lowest_free_ones_in_creation_order(vm: Booted) -> None:
    order = ["__console", "_disk0", "_disk1", "_net2", "_net3", "pairs"]
    slots = [int(bdf(vm, name)[8:10], 16) for name in order]
    assert slots == list(range(slots[0], slots[0] + len(order)))


def test_bars_of_the_device_tree_are_where_the_guest_has_them(vm: Booted) -> None:
    wait_until(
        lambda: tree_bars(vm) == guest_bars(vm), "the device tree shows the guest's BARs", timeout_s=GUEST_S
    )
    assert all(tree_bars(vm).values())


Bar = tuple[int, int, int, str, bool]


def tree_bars(vm: Booted) -> dict[str, list[Bar]]:
    """Return index, base, size, type and prefetchability of each BAR, by address."""
    fields = ("index", "base", "size", "type_", "prefetchable")
    nodes = [node for node in vm.info()["device_tree"].values() if "pci_bdf" in node]
    return {
        node["pci_bdf"]: [
            tuple(resource["PciBar"][field] for field in fields) for resource in node["resources"]
        ]
        for node in nodes
    }


def guest_bars(vm: Booted) -> dict[str, list[Bar]]:
    found = {}
    for address in tree_bars(vm):
        lines = vm.run(f"head -n 6 /sys/bus/pci/devices/{address}/resource").splitlines()
        ranges = [[int(word, 16) for word in line.split()] for line in lines]
        found[address] = [
            (index, first, last - first + 1, bar_type(flags), bool(flags & IORESOURCE_PREFETCH))
            for index, (first, last, flags) in enumerate(ranges)
            if last
        ]
    return found


def bar_type(flags: int) -> str:
    if flags & IORESOURCE_IO:
        return "Io"
    return "Mmio64" if flags & IORESOURCE_MEM_64 else "Mmio32"


def test_queues_passed_as_descriptors_serve_a_guest_of_the_command_line(
    namespace: None, tmp_path: Path
) -> None:
    fds = open_tap("passed0", queues=2)
    ip("addr add 192.168.6.1/24 dev passed0")
    ip("link set passed0 up")
    payload = direct_boot()
    try:
        with serving(
            tmp_path,
            *("--kernel", payload["kernel"], "--initramfs", payload["initramfs"]),
            *("--cmdline", payload["cmdline"], "--cpus", "boot=2", "--memory", "size=256M"),
            *("--net", f"fd=[{fds[0]},{fds[1]}],mac=12:34:56:78:90:0a,num_queues=4", "--console", "pty"),
            pass_fds=fds,
        ) as vm:
            wait_until(vm.is_running, "the VM runs", timeout_s=GUEST_S)
            vm.open_shell()
            vm.wait_ready()
            assert vm.run("cat /sys/class/net/eth0/address; ls /sys/class/net/eth0/queues | wc -l") == (
                "12:34:56:78:90:0a\n4"
            )
            vm.run("ifconfig eth0 192.168.6.2 netmask 255.255.255.0 up && ping -c 3 -W 10 192.168.6.1")
            ping("192.168.6.2")
            assert counters(vm, "_net0")["tx_bytes"] > 0
    finally:
        for fd in fds:
            os.close(fd)


def test_descriptors_sent_with_create_are_ignored(namespace: None, tmp_path: Path) -> None:
    fds = open_tap("ignored0")
    try:
        with serving(tmp_path) as server:
            server.vmm.put("vm.create", vm_config(net=[{"fds": fds, "tap": "other0"}]), fds=fds)
            assert "fds" not in server.config()["net"][0]
            server.vmm.put("vm.boot")
            assert "other0" in ip("link show")
    finally:
        for fd in fds:
            os.close(fd)


def test_existing_tap_of_one_queue_is_refused_for_several(namespace: None, tmp_path: Path) -> None:
    ip("tuntap add name single0 mode tap")
    with serving(tmp_path) as server:
        cpus = {"boot_vcpus": 2, "max_vcpus": 2}
        server.vmm.put("vm.create", vm_config(cpus=cpus, net=[{"tap": "single0", "num_queues": 4}]))
        assert "made for one queue" in server.vmm.put("vm.boot", expect=500)[-2]
    assert "single0" in ip("link show")
