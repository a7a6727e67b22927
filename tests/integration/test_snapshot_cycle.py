"""A guest that checks its memory and its disk is saved and forked over and over, and no byte is wrong.

Each step saves it where it stands, in the middle of its work, and goes on in one of the ways there are, as a
seed says: with the saved VM itself, or with one that is restored, by copy or on demand, in the same process
or in another, with or without the disk in the snapshot. Or it forks the guest while it works, and goes on
with the VM or with a clone of it, when all of them have found their bytes as they should be.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, make_image, serving, vm_config
from support.deadline import GUEST_S, HOST_S
from support.fork import CloneVm

pytestmark = pytest.mark.qemu

DISK = "disk"
DISK_MIB = 8
MOST_IMAGES = 20  # 32 may be below one another
ALL_WAYS = {"parent", "Copy", "OnDemand", "disks", "other process", "forked", "clone", "flattened"}
# A round writes noise to one of 8 places in memory and on the disk, and looks at what the others hold.
WORK = """
mkdir -p /tmp/w; cd /tmp/w
n=0
while [ ! -e bad ]; do
    at=$((n % 8))
    head -c 64k /dev/urandom >new && md5sum <new >new.sum
    dd if=new of=/dev/vda bs=64k seek=$at conv=fsync 2>/dev/null
    mv new $at; mv new.sum $at.sum
    for one in 0 1 2 3 4 5 6 7; do
        [ -e $one.sum ] || continue
        [ "$(md5sum <$one)" = "$(cat $one.sum)" ] || echo memory $one >>bad
        [ $one != $(((n + 3) % 8)) ] && continue
        echo 3 >/proc/sys/vm/drop_caches
        [ "$(dd if=/dev/vda bs=64k skip=$one count=1 2>/dev/null | md5sum)" = "$(cat $one.sum)" ] ||
            echo disk $one >>bad
    done
    n=$((n + 1)); echo $n >count.new; mv count.new count
done
"""
AWAIT_ROUNDS = """
n() { cat /tmp/w/count 2>/dev/null || echo 0; }
last=$(($(n) + 3))
until [ $(n) -ge $last ] || [ -e /tmp/w/bad ]; do usleep 200000; done
cat /tmp/w/bad 2>/dev/null || true
"""


class Cycle:
    """The guest, wherever it is by now, and the folders of its snapshots and clones."""

    def __init__(self, home: Path, seed: int, stack: contextlib.ExitStack) -> None:
        self.random = random.Random(seed)
        self.home = home
        self.ways: Counter[str] = Counter()
        self._server = contextlib.ExitStack()
        stack.callback(lambda: self._server.close())
        self._number = 0
        self._images = 1
        self._has_base = False
        image = make_image(home / "disk", DISK_MIB * MIB)
        config = vm_config(disks=[{"id": DISK, "path": str(image), "image_type": "Raw"}])
        self.vm: Booted | CloneVm = self._server.enter_context(booting(home / "vmm0", config))
        self.vm.run(f"cat >/tmp/work <<'END'\n{WORK}\nEND\n(sh /tmp/work >/dev/null 2>&1 </dev/null &)")
        await_rounds(self.vm)

    def step(self) -> None:
        self._number += 1
        way = self.random.choice(["parent", "Copy", "OnDemand", "OnDemand", "fork", "fork", "fork"])
        if way == "fork" and self._images < MOST_IMAGES:
            self._fork()
        else:
            self._save(way)

    def _fork(self) -> None:
        count = self.random.choice([1, 2])
        told = self.vm.vmm.put("vm.fork", {"directory": str(self.home), "count": count}, expect=200)
        self._images += 1
        clones = [CloneVm(each) for each in told["clones"]]
        for vm in (self.vm, *clones):
            await_rounds(vm)
        if self.random.random() < 0.5:
            self.ways["forked"] += 1
        else:
            self.ways["clone"] += 1
            self.vm.vmm.put("vm.delete", expect=204)
            self.vm = clones.pop()
            self._server.callback(self.vm.end)
            self._has_base = not self._has_base  # who begins at a VM that has one gets memory of its own
        for clone in clones:
            clone.end()
            shutil.rmtree(clone.folder)

    def _save(self, way: str) -> None:
        folder = self.home / f"snapshot{self._number}"
        folder.mkdir()
        self.vm.vmm.put("vm.pause", expect=204)
        disks = self._with_disks()
        self.vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}", **disks}, expect=204)
        if way == "fork" or (way == "OnDemand" and self._has_base):
            way = "Copy"  # what was saved of it is in one stream
        self.ways[way] += 1
        if way == "parent":
            self.vm.vmm.put("vm.resume", expect=204)
        else:
            self._restore(folder, way, disks)
        await_rounds(self.vm)
        shutil.rmtree(folder)

    def _with_disks(self) -> dict[str, Any]:
        """Now and then have the disk in the snapshot, which adds an image to those below the guest's."""
        if self._images >= MOST_IMAGES or self.random.random() < 0.7:
            return {}
        self._images += 1
        self.ways["disks"] += 1
        return {"overlay_directory": str(self.home)}

    def _restore(self, folder: Path, mode: str, disks: dict[str, Any]) -> None:
        path = self.vm.config()["disks"][0]["path"]
        self.vm.vmm.put("vm.delete", expect=204)
        if self._images >= MOST_IMAGES and not disks:
            disks = self._flattened(path)
        if self.random.random() < 0.3:
            self._server.close()
            self.vm = self._server.enter_context(serving(self.home / f"vmm{self._number}"))
            self.ways["other process"] += 1
        request = {"source_url": f"file://{folder}", "memory_restore_mode": mode, "resume": True, **disks}
        self.vm.vmm.put("vm.restore", request, expect=204)
        self.vm.open_shell()
        self._has_base = mode == "OnDemand"

    def _flattened(self, path: str) -> dict[str, Any]:
        """Have all that the images have in one."""
        self._images = 1
        self.ways["flattened"] += 1
        flat = str(self.home / f"flat{self._number}")
        subprocess.run(
            ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, flat], check=True, timeout=HOST_S
        )
        change = {"id": DISK, "path": flat, "image_type": "Raw", "backing_files": False}
        return {"overrides": {"disks": [change]}}


def await_rounds(vm: Booted | CloneVm) -> None:
    """Return when the guest has looked at all its memory again, and found it as it should be."""
    words = vm.run(AWAIT_ROUNDS, timeout_s=GUEST_S)
    assert words == "", f"The guest found wrong bytes: {words}"


@pytest.mark.parametrize("steps", [4, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_guest_that_is_saved_and_forked_again_and_again_has_no_wrong_byte(tmp_path: Path, steps: int) -> None:
    with contextlib.ExitStack() as stack:
        cycle = Cycle(tmp_path, steps, stack)
        for _ in range(steps):
            cycle.step()
    print(dict(cycle.ways))
    assert cycle.ways.keys() & {"Copy", "OnDemand"}
    assert cycle.ways.keys() & {"forked", "clone"}
    assert steps < 100 or cycle.ways.keys() >= ALL_WAYS
