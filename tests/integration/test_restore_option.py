"""What a restore is told beside where the snapshot lies: descriptors, overrides, memory taken at once."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from support.booted import MIB, Booted, booting, make_image, vm_config
from support.deadline import GUEST_S
from support.namespace import ip, network_namespace, open_tap, ping

pytestmark = [pytest.mark.qemu, pytest.mark.root]

HOST, GUEST = "192.168.47.1", "192.168.47.2"
RAM_KIB = 256 * 1024


def make_tap(name: str) -> int:
    """Make an interface; return its queue, which is the caller's."""
    (fd,) = open_tap(name, queues=1)
    ip(f"addr add {HOST}/24 dev {name}")
    ip(f"link set {name} up")
    return fd


def rss_kib(vm: Booted) -> int:
    """Return how much of the guest's RAM is in QEMU's hands."""
    status = Path(f"/proc/{vm.qemu_pid()}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssShmem:")))


def test_restored_guest_has_other_descriptors_paths_and_consoles(tmp_path: Path) -> None:
    """Ids are numbered on, and the snapshot stays as it is; what is edited in it by hand holds too."""
    images = [make_image(tmp_path / name, MIB) for name in ("boot", "later")]
    folder = tmp_path / "snapshot"
    folder.mkdir()
    config = vm_config(disks=[{"path": str(images[0]), "image_type": "Raw"}])
    with network_namespace(), booting(tmp_path / "run", config) as vm:
        first = make_tap("restored0")
        vm.vmm.put("vm.add-net", {"id": "n", "num_queues": 2}, fds=[first], expect=200)
        os.close(first)
        vm.run("until [ -e /sys/class/net/eth0 ]; do usleep 20000; done")
        vm.run(f"ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up")
        ping(GUEST)
        vm.vmm.put("vm.pause", expect=204)
        vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}"}, expect=204)
        before = (folder / "config.json").read_bytes()
        vm.vmm.put("vm.delete", expect=204)

        moved = images[0].rename(tmp_path / "moved")
        moved.write_bytes(b"moved".ljust(MIB, b"\0"))
        request = {
            "source_url": f"file://{folder}",
            "prefault": True,
            "resume": True,
            "net_fds": [{"id": "n", "num_fds": 1}],
            "overrides": {
                "disks": [{"id": "_disk0", "path": str(moved)}],
                "serial": {"mode": "File", "file": str(tmp_path / "log")},
            },
        }
        (*_, last) = vm.vmm.put("vm.restore", request | {"net_fds": None}, expect=400)
        assert last == "Net id n is associated with FDs and is required"
        second = make_tap("restored1")
        vm.vmm.put("vm.restore", request, fds=[second], expect=204)
        os.close(second)
        vm.open_shell()
        assert rss_kib(vm) >= RAM_KIB
        ping(GUEST)
        assert vm.run("dd if=/dev/vda bs=5 count=1 iflag=direct 2>/dev/null || head -c 5 /dev/vda") == "moved"
        vm.run("echo to the log >/dev/ttyS0", timeout_s=GUEST_S)
        assert "to the log" in (tmp_path / "log").read_text()
        added = vm.vmm.put("vm.add-disk", {"path": str(images[1]), "image_type": "Raw"}, expect=200)
        assert added["id"] == "_disk1"
        assert (folder / "config.json").read_bytes() == before
        vm.vmm.put("vm.delete", expect=204)

        edited = msgspec.json.decode(before)
        edited["disks"][0]["path"] = str(moved)
        del edited["net"][0]["fds"]
        edited["net"][0]["tap"] = "restored2"
        (folder / "config.json").write_bytes(msgspec.json.encode(edited))
        vm.vmm.put("vm.restore", {"source_url": f"file://{folder}", "resume": True}, expect=204)
        vm.open_shell()
        assert vm.run("head -c 5 /dev/vda") == "moved"
        assert "restored2" in ip("link show")
