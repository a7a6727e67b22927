"""A disk and a network device that come and go many times on one VM leave nothing, and ids never clash."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.client import Client
from support.attack import Held, assert_holds_no_more
from support.booted import MIB, Booted, booting, make_image, vm_config
from support.device.case import GUEST_S, find
from support.namespace import ip, network_namespace
from support.shared import shared

pytestmark = [pytest.mark.qemu, pytest.mark.root]

WARM_CYCLES = 3
CYCLES = [
    15,
    pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
]
# What a hundred cycles may add: buffers that grow by doubling, code that is translated anew.
QEMU_GROWTH_BYTES = 8 * MIB
SERVER_GROWTH_BYTES = 2 * MIB
SLAB_GROWTH_BYTES = 2 * MIB


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    folder = tmp_path_factory.mktemp("cycle")
    make_image(folder / "disk.raw", 4 * MIB)
    with (
        network_namespace(),
        booting(folder, vm_config(memory={"size": 256 * MIB, "shared": True})) as booted,
    ):
        yield booted


@pytest.mark.parametrize("cycles", CYCLES)
def test_devices_that_come_and_go_leave_nothing(vm: Booted, cycles: int) -> None:
    ids: list[str] = []
    with Client(vm.server.socket_path) as client:
        for _ in range(WARM_CYCLES):
            ids += cycle(vm, client)
        before, growth = picture(vm), Growth(vm)
        qemu, server = Held(vm.qemu_pid()), Held(vm.server.pid)
        for _ in range(cycles):
            ids += cycle(vm, client)
    assert len(set(ids)) == len(ids) == WARM_CYCLES + cycles
    assert picture(vm) == before
    assert_holds_no_more(vm.server.pid, server)
    # Threads of its pool come and go with what is written; descriptors do not.
    assert Held(vm.qemu_pid()).descriptors == qemu.descriptors
    growth.check(vm)


def cycle(vm: Booted, client: Client) -> list[str]:
    """Add both, see them in the guest, remove both; return the id that was generated."""
    disk = vm.vmm.put("vm.add-disk", {"path": str(vm.folder / "disk.raw"), "image_type": "Raw"}, expect=200)
    net = vm.vmm.put("vm.add-net", {"id": "again", "tap": "cycle0"}, expect=200)
    name = find(vm, disk["bdf"], "block")
    vm.run(f"echo {disk['id']} | dd of=/dev/{name} bs=512 conv=sync,fsync 2>/dev/null")
    assert (vm.folder / "disk.raw").read_bytes()[:16].startswith(f"{disk['id']}\n".encode())
    vm.run(f"ifconfig {find(vm, net['bdf'], 'net')} up")
    for device_id in (disk["id"], "again"):
        client.remove_device(device_id, GUEST_S)
        assert device_id not in vm.info()["device_tree"]
    return [disk["id"]]


def picture(vm: Booted) -> dict[str, object]:
    """What there is in the VM, in its guest and on the host."""
    info = vm.info()
    return {
        "config": info["config"],
        "tree": sorted(info["device_tree"]),
        "guest": vm.run("ls /sys/bus/pci/devices /sys/block /sys/class/net /sys/bus/virtio/devices"),
        "links": sorted(ip("-o link").split(": ")[1::2]),
        "files": sorted(os.listdir(vm.folder)),
    }


class Growth:
    """How much memory QEMU, the server and the guest's kernel have taken since this was made."""

    def __init__(self, vm: Booted) -> None:
        self.sizes = self._measure(vm)

    def check(self, vm: Booted) -> None:
        added = {name: now - self.sizes[name] for name, now in self._measure(vm).items()}
        assert added["qemu"] < QEMU_GROWTH_BYTES, added
        assert added["server"] < SERVER_GROWTH_BYTES, added
        assert added["slab"] < SLAB_GROWTH_BYTES, added

    def _measure(self, vm: Booted) -> dict[str, int]:
        return {
            "qemu": _number("RssAnon", Path(f"/proc/{vm.qemu_pid()}/status").read_text()),
            "server": _number("RssAnon", Path(f"/proc/{vm.server.pid}/status").read_text()),
            "slab": _number("SUnreclaim", vm.run("cat /proc/meminfo")),
        }


def _number(name: str, text: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    assert found is not None, text
    return int(found[1]) * 1024
