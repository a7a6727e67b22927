"""Disks and network devices that are added to and removed from a VM that runs, seen from inside the guest.

One guest serves most tests of the QEMU on the path; each of them leaves it as it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, make_image, vm_config
from support.deadline import GUEST_S, HOST_S
from support.lock import is_locked
from support.namespace import ip, network_namespace, open_tap, ping
from support.old_qemu import old_qemu_program
from support.removal import Churn
from support.shared import shared
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

DISK_BYTES = 4 * MIB
COLD = ("cold", "coldnet")


@pytest.fixture(scope="module")
def namespace() -> Iterator[None]:
    with network_namespace():
        yield


@shared()
def shared_vm(namespace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest of two vCPUs with a disk and a network device of its own."""
    folder = tmp_path_factory.mktemp("hotplug")
    with booting(folder, cold_config(folder, "coldtap")) as booted:
        yield booted


@pytest.fixture
def old_vm(namespace: None, tmp_path: Path) -> Iterator[Booted]:
    """The same on the oldest QEMU, unpacked in the folder that CLOUDVMM_TEST_OLD_QEMU names."""
    program = old_qemu_program(tmp_path)
    with booting(tmp_path / "run", cold_config(tmp_path), "--qemu", str(program)) as booted:
        yield booted


def cold_config(folder: Path, tap: str = "owntap") -> dict[str, Any]:
    (folder / "run").mkdir(exist_ok=True)
    disk = {"id": "cold", "path": str(make_image(folder / "cold.raw", DISK_BYTES)), "image_type": "Raw"}
    cpus = {"boot_vcpus": 2, "max_vcpus": 2}
    return vm_config(
        cpus=cpus,
        disks=[disk],
        net=[{"id": "coldnet", "tap": tap}],
        memory={"size": 256 * MIB, "shared": True},
    )


@pytest.fixture
def as_before(vm: Booted) -> Iterator[None]:
    """Fail where the test leaves something in the VM, in QEMU, in the server or in the guest."""
    before = state(vm)
    yield
    wait_until(lambda: state(vm) == before, f"the VM is as it was: {before}", timeout_s=GUEST_S)


def state(vm: Booted) -> dict[str, Any]:
    info = vm.info()
    return {
        "config": info["config"],
        "tree": sorted(info["device_tree"]),
        "fds": open_files(vm.server.pid),
        "qemu": open_files(vm.qemu_pid()),
        "guest": vm.run("ls /sys/bus/pci/devices"),
        "links": sorted(ip("-o link").split(": ")[1::2]),
    }


def open_files(pid: int) -> list[str]:
    """Return the files and TAP queues that a process has open; sockets and such come and go by themselves."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(fd.readlink()))
    return sorted(path for path in found if path.startswith(("/tmp", "/dev/net")))


def pci_folder(bdf: str) -> str:
    return f"/sys/bus/pci/devices/{bdf}"


def add(vm: Booted, command: str, fds: list[int] | None = None, **device: Any) -> tuple[str, str]:
    """Add a device; return its id and address."""
    answer = vm.vmm.put(command, device, expect=200, fds=fds)
    assert vm.info()["device_tree"][f"_virtio-pci-{answer['id']}"]["pci_bdf"] == answer["bdf"]
    return answer["id"], answer["bdf"]


def find(vm: Booted, bdf: str, kind: str) -> str:
    """Return the guest's name of the device at `bdf`, once its driver has it: of `kind` "block" or "net"."""
    glob = f"{pci_folder(bdf)}/virtio*/{kind}/*"
    return vm.run(f"until ls -d {glob} 2>/dev/null; do usleep 20000; done", timeout_s=GUEST_S).split("/")[-1]


def remove(vm: Booted, device_id: str) -> None:
    """Remove a device and wait until the guest has let go of it."""
    count = removals(vm, device_id)
    vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
    wait_removed(vm, device_id, count + 1)


def removals(vm: Booted, device_id: str) -> int:
    return sum(
        document["event"] == "device-removed" and document["properties"]["id"] == device_id
        for document in vm.events.documents()
    )


def wait_removed(vm: Booted, device_id: str, count: int = 1) -> None:
    wait_until(
        lambda: removals(vm, device_id) == count, f"{device_id} is removed {count} times", timeout_s=GUEST_S
    )
    assert device_id not in vm.info()["device_tree"]


def raw_image(vm: Booted, name: str, content: bytes = b"") -> Path:
    image = make_image(vm.folder / name, DISK_BYTES)
    with image.open("r+b") as file:
        file.write(content)
    return image


def qcow2_image(vm: Booted, name: str) -> Path:
    image = vm.folder / name
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(DISK_BYTES)]
    subprocess.run(command, check=True, timeout=HOST_S)
    return image


@pytest.mark.usefixtures("as_before")
def test_raw_disk_is_read_written_counted_and_removed(vm: Booted) -> None:
    image = raw_image(vm, "hot.raw", b"from the host")
    device_id, bdf = add(vm, "vm.add-disk", path=str(image), image_type="Raw", serial="hot,one", num_queues=2)
    name = find(vm, bdf, "block")

    assert (
        vm.run(f"cd /sys/block/{name} && ls mq && cat size serial") == f"0\n1\n{DISK_BYTES // 512}\nhot,one"
    )
    assert vm.run(f"head -c 13 /dev/{name}") == "from the host"
    before = vm.vmm.get("vm.counters")[device_id]
    vm.run(f"tr '\\0' W </dev/zero | dd of=/dev/{name} bs=4096 count=3 seek=4 iflag=fullblock oflag=direct")
    after = vm.vmm.get("vm.counters")[device_id]
    assert after["write_bytes"] - before["write_bytes"] == 3 * 4096
    assert 0 < after["write_latency_min"] <= after["write_latency_avg"] <= after["write_latency_max"]
    assert image.read_bytes()[16384:28672] == b"W" * 12288
    assert is_locked(image)

    remove(vm, device_id)
    assert vm.run(f"test ! -e {pci_folder(bdf)} && test ! -e /sys/block/{name} && echo gone") == "gone"
    assert not is_locked(image)
    assert device_id not in vm.vmm.get("vm.counters")


@pytest.mark.usefixtures("as_before")
def test_qcow2_disk_is_written_and_its_image_is_whole_behind(vm: Booted) -> None:
    image = qcow2_image(vm, "hot.qcow2")
    device_id, bdf = add(vm, "vm.add-disk", path=str(image), image_type="Qcow2", id="second")
    name = find(vm, bdf, "block")
    assert vm.run(f"cat /sys/block/{name}/size") == str(DISK_BYTES // 512)
    vm.run(f"echo written | dd of=/dev/{name} bs=512 conv=sync,fsync 2>/dev/null")
    assert vm.run(f"head -c 7 /dev/{name}") == "written"

    remove(vm, device_id)
    subprocess.run(["qemu-img", "check", "-q", str(image)], check=True, timeout=HOST_S)


@pytest.mark.usefixtures("as_before")
def test_readonly_disk_that_bypasses_the_page_cache_is_read_and_not_written(vm: Booted) -> None:
    image = raw_image(vm, "readonly.raw", b"fixed")
    device_id, bdf = add(vm, "vm.add-disk", path=str(image), image_type="Raw", readonly=True, direct=True)
    name = find(vm, bdf, "block")
    assert vm.run(f"cat /sys/block/{name}/ro; head -c 5 /dev/{name}") == "1\nfixed"
    status, _ = vm.shell.run(f"echo x | dd of=/dev/{name} bs=512 conv=sync,fsync", timeout_s=GUEST_S)
    assert status != 0
    remove(vm, device_id)


@pytest.mark.usefixtures("as_before")
def test_driver_and_bars_of_an_added_disk_are_told(vm: Booted) -> None:
    image = raw_image(vm, "told.raw")
    device_id, _ = add(vm, "vm.add-disk", path=str(image), image_type="Raw", id="told")
    wrapper = f"_virtio-pci-{device_id}"
    wait_until(lambda: driver_events(vm, device_id) == ["activated"], "its driver", timeout_s=GUEST_S)
    wait_until(lambda: vm.info()["device_tree"][wrapper]["resources"], "its BARs", timeout_s=GUEST_S)
    remove(vm, device_id)
    assert driver_events(vm, device_id) == ["activated", "reset"]


def driver_events(vm: Booted, device_id: str) -> list[str]:
    return [
        document["event"]
        for document in vm.events.documents()
        if document["source"] == "virtio-device" and document["properties"]["id"] == device_id
    ]


@pytest.mark.usefixtures("as_before")
def test_slot_and_id_are_used_again(vm: Booted) -> None:
    image = raw_image(vm, "again.raw", b"again")
    for _ in range(2):  # what tests before have left in a hurry is as good as any slot again
        _, bdf = add(vm, "vm.add-disk", path=str(image), image_type="Raw", id="before")
        find(vm, bdf, "block")
        remove(vm, "before")
    seen = set()
    for _ in range(3):
        device_id, bdf = add(vm, "vm.add-disk", path=str(image), image_type="Raw", id="again")
        seen.add((device_id, bdf))
        assert vm.run(f"head -c 5 /dev/{find(vm, bdf, 'block')}") == "again"
        remove(vm, device_id)
    assert len(seen) == 1


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("changes", [150, pytest.param(3000, marks=[pytest.mark.long])])
def test_devices_that_come_and_go_in_quick_order_do_not_take_others_along(vm: Booted, changes: int) -> None:
    names = [f"quick{number}" for number in range(4)]
    churn = Churn(vm, {name: str(raw_image(vm, f"{name}.raw")) for name in names}, seed=changes)
    for _ in range(changes):
        churn.change()
    churn.end()


@pytest.mark.usefixtures("as_before")
def test_ten_disks_come_and_go(vm: Booted) -> None:
    disks = []
    for number in range(10):
        image = raw_image(vm, f"ten{number}.raw", b"disk %d" % number)
        disks.append(add(vm, "vm.add-disk", path=str(image), image_type="Raw", id=f"ten{number}"))
    for number, (_, bdf) in enumerate(disks):
        assert vm.run(f"head -c 6 /dev/{find(vm, bdf, 'block')}") == f"disk {number}"
    for device_id, _ in disks:
        vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
    for device_id, _ in disks:
        wait_removed(vm, device_id)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("cycles", [10, pytest.param(100, marks=[pytest.mark.long])])
def test_limited_disk_and_network_device_come_and_go_over_and_over(vm: Booted, cycles: int) -> None:
    image = raw_image(vm, "often.raw", b"often")
    limit = {"bandwidth": {"size": DISK_BYTES, "refill_time": 1000, "one_time_burst": DISK_BYTES}}
    for _ in range(cycles):
        disk_id, disk_bdf = add(
            vm, "vm.add-disk", path=str(image), image_type="Raw", rate_limiter_config=limit
        )
        net_id, net_bdf = add(vm, "vm.add-net", tap="often0", rate_limiter_config=limit)
        assert vm.run(f"head -c 5 /dev/{find(vm, disk_bdf, 'block')}") == "often"
        assert find(vm, net_bdf, "net")
        remove(vm, disk_id)
        remove(vm, net_id)


@pytest.mark.usefixtures("as_before")
def test_device_added_and_removed_while_paused_comes_and_goes_with_resume(vm: Booted) -> None:
    image = raw_image(vm, "paused.raw", b"paused")
    vm.vmm.put("vm.pause")
    device_id, bdf = add(vm, "vm.add-disk", path=str(image), image_type="Raw", id="paused")
    vm.vmm.put("vm.resume")
    assert vm.run(f"head -c 6 /dev/{find(vm, bdf, 'block')}") == "paused"

    vm.vmm.put("vm.pause")
    for _ in range(2):  # asking again is allowed
        vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
    assert not is_locked(image)
    assert device_id in vm.info()["device_tree"]
    assert removals(vm, device_id) == 0
    vm.vmm.put("vm.resume")
    wait_removed(vm, device_id)


@pytest.mark.usefixtures("as_before")
def test_network_device_by_tap_name_carries_packets_both_ways(vm: Booted) -> None:
    ip("tuntap add name hot0 mode tap")
    ip("addr add 192.168.30.1/24 dev hot0")
    try:
        device_id, bdf = add(vm, "vm.add-net", tap="hot0", mac="12:34:56:78:91:01", mtu=1400)
        name = find(vm, bdf, "net")
        address = f"/sys/class/net/{name}"
        assert vm.run(f"cat {address}/address {address}/mtu") == "12:34:56:78:91:01\n1400"
        vm.run(f"ifconfig {name} 192.168.30.2 netmask 255.255.255.0 up && ping -c 3 -W 10 192.168.30.1")
        ping("192.168.30.2")
        assert vm.vmm.get("vm.counters")[device_id]["tx_frames"] >= 3
        remove(vm, device_id)
        assert vm.run(f"test ! -e {address} && echo gone") == "gone"
        assert device_id not in vm.vmm.get("vm.counters")
        assert "hot0" in ip("link show")
    finally:
        ip("link del hot0")


@pytest.mark.usefixtures("as_before")
def test_network_device_whose_tap_we_make_takes_it_along(vm: Booted) -> None:
    device_id, bdf = add(
        vm, "vm.add-net", tap="made7", ip="192.168.31.1", mask="255.255.255.0", offload_tso=False
    )
    name = find(vm, bdf, "net")
    vm.run(f"ifconfig {name} 192.168.31.2 netmask 255.255.255.0 up && ping -c 3 -W 10 192.168.31.1")
    ping("192.168.31.2")
    remove(vm, device_id)
    assert "made7" not in ip("link show")


@pytest.mark.usefixtures("as_before")
def test_network_device_by_passed_queues_carries_packets_both_ways(vm: Booted) -> None:
    fds = open_tap("queues7", queues=2)
    try:
        ip("addr add 192.168.32.1/24 dev queues7")
        ip("link set queues7 up")
        device_id, bdf = add(vm, "vm.add-net", fds, num_queues=4, mac="12:34:56:78:91:02")
    finally:
        for fd in fds:
            os.close(fd)
    name = find(vm, bdf, "net")
    assert vm.run(f"ls /sys/class/net/{name}/queues") == "rx-0\nrx-1\ntx-0\ntx-1"
    vm.run(f"ifconfig {name} 192.168.32.2 netmask 255.255.255.0 up && ping -c 3 -W 10 192.168.32.1")
    ping("192.168.32.2")
    remove(vm, device_id)
    # Nobody has its queues any more: not we, not the server, not QEMU.
    assert "queues7" not in ip("link show")


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    ("command", "device", "words"),
    [
        ("vm.add-disk", {"path": "/no/such/image"}, "No such file or directory"),
        ("vm.add-disk", {"path": "/tmp"}, "Is a directory"),
        ("vm.add-disk", {"path": "{folder}/broken.qcow2", "image_type": "Qcow2"}, "cut off"),
        ("vm.add-disk", {"path": "{folder}/cold.raw", "image_type": "Raw"}, "is locked by another user"),
        ("vm.add-disk", {"path": "{folder}/bad.qcow2", "image_type": "Qcow2"}, "L1"),
        ("vm.add-disk", {"path": "{folder}/free.raw", "pci_device_id": 3}, "already used"),
        ("vm.add-net", {"tap": "coldtap-is-too-long"}, "is not valid"),
        ("vm.add-net", {"tap": "lo"}, "Invalid argument"),
        ("vm.add-vdpa", {"path": "/s"}, "No such file or directory: /s (os error 2)"),
    ],
)
def test_device_that_cannot_be_had_leaves_nothing(
    vm: Booted, command: str, device: dict[str, Any], words: str
) -> None:
    (vm.folder / "broken.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + bytes(56))
    make_image(vm.folder / "free.raw", DISK_BYTES)
    bad_image(vm)
    body = {
        key: value.format(folder=vm.folder) if isinstance(value, str) else value
        for key, value in device.items()
    }

    chain = vm.vmm.put(command, body, expect=500)

    assert words in " | ".join(chain)


def bad_image(vm: Booted) -> Path:
    """Make an image that QEMU alone finds to be bad."""
    image = qcow2_image(vm, "bad.qcow2")
    bad = bytearray(image.read_bytes())
    bad[40:48] = b"\xff" * 8  # where the L1 table is: no place that an image can have
    image.write_bytes(bad)
    return image


def test_cold_devices_are_removed_and_a_reboot_does_not_bring_them_back(
    namespace: None, tmp_path: Path
) -> None:
    with booting(tmp_path, cold_config(tmp_path)) as vm:
        bdfs = {name: vm.info()["device_tree"][f"_virtio-pci-{name}"]["pci_bdf"] for name in COLD}
        for device_id in COLD:
            remove(vm, device_id)
        assert "owntap" not in ip("link show")
        for bdf in bdfs.values():
            assert vm.run(f"test ! -e {pci_folder(bdf)} && echo gone") == "gone"
        assert open_files(vm.qemu_pid()) == []

        image = raw_image(vm, "kept.raw", b"kept")
        add(vm, "vm.add-disk", path=str(image), image_type="Raw", id="kept")
        add(vm, "vm.add-disk", path=str(raw_image(vm, "left.raw")), image_type="Raw", id="left")
        vm.vmm.put("vm.pause")
        vm.vmm.put("vm.remove-device", {"id": "left"}, expect=204)
        vm.vmm.put("vm.reboot")
        vm.close_shell()
        vm.open_shell()
        vm.wait_ready()
        assert vm.run("ls /sys/block; head -c 4 /dev/vda") == "vda\nkept"
        assert "left" not in vm.info()["device_tree"]


def test_devices_that_the_guest_ejects_unasked_are_gone_and_come_back_with_a_reboot(
    namespace: None, tmp_path: Path
) -> None:
    names = ("cold", "coldnet", "__rng")
    with booting(tmp_path, cold_config(tmp_path)) as vm:
        before = vm.info()["device_tree"].keys()
        for device_id in names:
            slot = int(vm.info()["device_tree"][f"_virtio-pci-{device_id}"]["pci_bdf"][8:10], 16)
            vm.run(f"echo 0 >/sys/bus/pci/slots/{slot}/power")
        for device_id in names:
            wait_removed(vm, device_id)
        assert not is_locked(tmp_path / "cold.raw")
        assert "owntap" not in ip("link show")
        vm.vmm.put("vm.reboot")
        assert vm.info()["device_tree"].keys() == before


def test_qemu_that_dies_meanwhile_leaves_nothing(namespace: None, tmp_path: Path) -> None:
    with booting(tmp_path, cold_config(tmp_path), "--no-shutdown") as vm, vm.vmm.second() as other:
        config, qemu = vm.config(), vm.qemu_pid()
        os.kill(qemu, signal.SIGSTOP)
        chains: list[list[str]] = []
        asking = threading.Thread(
            target=lambda: chains.append(other.put("vm.add-net", {"tap": "dying0"}, expect=500))
        )
        asking.start()
        wait_until(lambda: "dying0" in ip("link show"), "the TAP is made", timeout_s=GUEST_S)
        os.kill(qemu, signal.SIGKILL)
        asking.join(GUEST_S)
        assert any("QEMU was killed by signal 9" in text for text in chains[0])
        wait_until(lambda: vm.info()["state"] == "Created", "the VM is gone", timeout_s=GUEST_S)
        assert vm.config() == config
        assert "dying0" not in ip("link show")


def test_oldest_qemu_adds_and_removes_too(old_vm: Booted) -> None:
    image = qcow2_image(old_vm, "old.qcow2")
    disk, disk_bdf = add(old_vm, "vm.add-disk", path=str(image), image_type="Qcow2", serial="old")
    old_vm.vmm.put("vm.pause")
    old_vm.vmm.put("vm.add-disk", {"path": str(bad_image(old_vm)), "image_type": "Qcow2"}, expect=500)
    net, net_bdf = add(
        old_vm, "vm.add-net", tap="old7", ip="192.168.33.1", mask="255.255.255.0", num_queues=4
    )
    old_vm.vmm.put("vm.resume")
    block, name = find(old_vm, disk_bdf, "block"), find(old_vm, net_bdf, "net")
    assert old_vm.run(f"cat /sys/block/{block}/serial") == "old"
    old_vm.run(f"echo written | dd of=/dev/{block} bs=512 conv=sync,fsync 2>/dev/null")
    old_vm.run(f"ifconfig {name} 192.168.33.2 netmask 255.255.255.0 up && ping -c 3 -W 10 192.168.33.1")
    ping("192.168.33.2")
    old_vm.vmm.put("vm.pause")
    for device_id in (disk, disk, net, *COLD):
        old_vm.vmm.put("vm.remove-device", {"id": device_id}, expect=204)
    old_vm.vmm.put("vm.resume")
    for device_id in (disk, net, *COLD):
        wait_removed(old_vm, device_id)
    assert open_files(old_vm.qemu_pid()) == []
    assert "old7" not in ip("link show")
    subprocess.run(["qemu-img", "check", "-q", str(image)], check=True, timeout=HOST_S)
