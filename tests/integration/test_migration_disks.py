"""Disks that are copied along with their guest, which writes to them meanwhile."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, booting, make_image, serving, vm_config
from support.certificate import Authority
from support.deadline import GUEST_S
from support.lock import is_locked
from support.qemu import find_qemu
from support.traveller import HOST, receiving, tcp_url
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

DISK_BYTES = 64 * MIB
# The first half is written once, the second all the time, each time with what it is then said to be.
FILL = "dd if=/dev/urandom of=/dev/vda bs=1M count=32 conv=fsync"
LOAD = """
(while [ ! -e /tmp/stop ]; do
  dd if=/dev/urandom of=/tmp/piece bs=64k count=4
  dd if=/tmp/piece of=/dev/vda bs=64k seek=$((512 + RANDOM % 500)) conv=fsync
done; touch /tmp/still) >/dev/null 2>&1 &
"""
STOP = "touch /tmp/stop; until [ -e /tmp/still ]; do usleep 50000; done; sync; md5sum /dev/vda"


ZONED = {"size": 0, "zones": [{"id": "z", "size": 256 * MIB}]}


def on_node(node: int) -> dict[str, Any]:
    """Return what has the guest's memory come from that NUMA node of the host."""
    return {"zone_updates": [{"id": "z", "host_numa_node": node}]}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("version", ["path", pytest.param("7.2", marks=pytest.mark.long)])
def test_disk_comes_along_and_is_the_guests_there(tmp_path: Path, version: str) -> None:
    flags = ("--qemu", find_qemu(version, tmp_path))
    here, there = make_image(tmp_path / "here", DISK_BYTES), tmp_path / "there"
    disk = {"id": "d", "path": str(here), "image_type": "Raw"}
    url = f"unix:{tmp_path}/way"
    moved = {"overrides": {"disks": [{"id": "d", "path": str(there)}]}, **on_node(0)}
    with (
        booting(tmp_path / "first", vm_config(disks=[disk], memory=ZONED), *flags) as source,
        serving(tmp_path / "second", *flags) as target,
    ):
        source.run(FILL, timeout_s=GUEST_S)
        source.run(LOAD)

        # Without another path it is the same image.
        arrive = receiving(target, url, on_node(0), expect=500)
        source.vmm.put("vm.send-migration", {"destination_url": url, "copy_disks": ["d"]}, expect=204)
        assert "give another path" in " ".join(arrive())
        source.events.wait("vm/migration-failed", timeout_s=GUEST_S)

        # A host without such a node has no memory for it.
        arrive = receiving(target, url, {**moved, **on_node(63)}, expect=500)
        source.vmm.put("vm.send-migration", {"destination_url": url, "copy_disks": ["d"]}, expect=204)
        arrive()
        source.events.wait("vm/migration-failed", count=2, timeout_s=GUEST_S)
        assert not there.exists()

        # Called off, it leaves nothing there.
        arrive = receiving(target, url, moved, expect=500)
        source.vmm.put("vm.send-migration", {"destination_url": url, "copy_disks": ["d"]}, expect=204)
        wait_until(there.exists, "the image that is copied to", timeout_s=GUEST_S)
        source.vmm.put("vm.cancel-migration", expect=204)
        arrive()
        source.events.wait("vm/migration-failed", count=3, timeout_s=GUEST_S)
        wait_until(lambda: source.info()["state"] == "Running", "the guest runs on", timeout_s=GUEST_S)
        assert not there.exists()

        # Over TLS the disk's blocks are encrypted as all else is.
        tls = {"tls_dir": Authority(tmp_path / "ca", HOST).tls_dir}
        url = tcp_url()
        arrive = receiving(target, url, {**moved, **tls})
        send = {"destination_url": url, "copy_disks": ["d"], **tls}
        source.vmm.put("vm.send-migration", send, expect=204)
        arrive()
        source.server.wait_end(timeout_s=GUEST_S)
        left = md5(here)
        assert not is_locked(here)
        assert is_locked(there)
        target.open_shell()
        target.wait_ready()
        wrote = target.run(STOP, timeout_s=GUEST_S).split()[0]
        assert md5(there) == wrote
        assert md5(here) == left
        assert target.config()["memory"]["zones"][0]["host_numa_node"] == 0
        assert target.config()["disks"][0]["path"] == str(there)
