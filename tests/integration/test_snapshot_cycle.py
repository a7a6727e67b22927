"""A guest that checks its memory and its disk over and over is saved and goes on, and no byte is wrong.

Each step saves it where it stands, in the middle of its work, and goes on in one of the ways there are, as a
seed says: with the saved VM itself, or with one that is restored, by copy or on demand, in the same process
or in another, with or without the disk in the snapshot.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import pytest

from support.booted import MIB, booting, make_image, serving, vm_config
from support.deadline import GUEST_S

pytestmark = pytest.mark.qemu

DISK_MIB = 8
MOST_IMAGES = 20  # 32 may be below one another
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
    """The guest, wherever it is by now, and the folders of its snapshots."""

    def __init__(self, home: Path, seed: int, stack: contextlib.ExitStack) -> None:
        self.random = random.Random(seed)
        self.home = home
        self.ways: set[str] = set()
        self._server = contextlib.ExitStack()
        stack.callback(lambda: self._server.close())
        self._number = 0
        self._images = 1
        self._is_on_demand = False
        image = make_image(home / "disk", DISK_MIB * MIB)
        config = vm_config(disks=[{"path": str(image), "image_type": "Raw"}])
        self.vm = self._server.enter_context(booting(home / "vmm0", config))
        self.vm.run(f"cat >/tmp/work <<'END'\n{WORK}\nEND\n(sh /tmp/work >/dev/null 2>&1 </dev/null &)")
        self.await_rounds()

    def await_rounds(self) -> None:
        """Return when the guest has looked at all its memory again, and found it as it should be."""
        words = self.vm.run(AWAIT_ROUNDS, timeout_s=GUEST_S)
        assert words == "", f"The guest found wrong bytes: {words}"

    def step(self) -> None:
        self._number += 1
        folder = self.home / f"snapshot{self._number}"
        folder.mkdir()
        self.vm.vmm.put("vm.pause", expect=204)
        disks = self._with_disks()
        self.vm.vmm.put("vm.snapshot", {"destination_url": f"file://{folder}", **disks}, expect=204)
        way = self.random.choice(["parent", "Copy", "Copy", "OnDemand", "OnDemand"])
        if way == "OnDemand" and self._is_on_demand:
            way = "Copy"  # what was saved of it is in one stream
        self.ways.add(way)
        if way == "parent":
            self.vm.vmm.put("vm.resume", expect=204)
        else:
            self._restore(folder, way, disks)
        self.await_rounds()
        shutil.rmtree(folder)

    def _with_disks(self) -> dict[str, str]:
        """Now and then have the disk in the snapshot, which adds an image to those below the guest's."""
        if self._images >= MOST_IMAGES or self.random.random() < 0.7:
            return {}
        self._images += 1
        self.ways.add("disks")
        return {"overlay_directory": str(self.home)}

    def _restore(self, folder: Path, mode: str, disks: dict[str, str]) -> None:
        self.vm.vmm.put("vm.delete", expect=204)
        if self.random.random() < 0.3:
            self._server.close()
            self.vm = self._server.enter_context(serving(self.home / f"vmm{self._number}"))
            self.ways.add("other process")
        request = {"source_url": f"file://{folder}", "memory_restore_mode": mode, "resume": True, **disks}
        self.vm.vmm.put("vm.restore", request, expect=204)
        self.vm.open_shell()
        self._is_on_demand = mode == "OnDemand"


@pytest.mark.parametrize("steps", [3, pytest.param(100, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_guest_that_is_saved_again_and_again_has_no_wrong_byte(tmp_path: Path, steps: int) -> None:
    with contextlib.ExitStack() as stack:
        cycle = Cycle(tmp_path, steps, stack)
        for _ in range(steps):
            cycle.step()
        assert cycle.ways & {"Copy", "OnDemand"}
        assert steps < 100 or len(cycle.ways) == 5
