"""Devices that come and go in a hurry, and a guest that may have forgotten that one is to go."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

from support.booted import Booted
from support.deadline import GUEST_S
from support.wait import wait_until

ASK_AGAIN_S = 5.0


def remove_for_sure(vm: Booted, device_id: str) -> None:
    """Have the guest let go of a device, which may be going already.

    It is asked again and again: one that is told in one breath of a device that has come and is to go, as
    after a pause, takes it up and forgets the rest.
    """
    asked_s, answer = 0.0, None

    def is_gone() -> bool:
        nonlocal asked_s, answer
        if time.monotonic() > asked_s + ASK_AGAIN_S:
            answer = vm.vmm.exchange("PUT", "vm.remove-device", {"id": device_id})
            asked_s = time.monotonic()
        return device_id not in vm.info()["device_tree"]

    try:
        wait_until(is_gone, f"the device {device_id} is gone", timeout_s=GUEST_S)
    except AssertionError as error:
        error.add_note(f"{answer}\n{vm.run('dmesg | tail -n 40', timeout_s=GUEST_S)}")
        raise


class Churn:
    """Disks that are added and removed, as a seed will have it, without a look at what the guest makes of it.

    `images` are paths of raw images, by the ids of their disks.
    """

    def __init__(self, vm: Booted, images: Mapping[str, str], seed: int) -> None:
        self._vm = vm
        self._images = images
        self._random = random.Random(seed)

    def change(self) -> None:
        """Add a disk, or remove one; those that are to be there are."""
        present, tree = self.check()
        name = self._random.choice(list(self._images))
        if name in present:
            self._vm.vmm.put("vm.remove-device", {"id": name}, expect=204)
            return
        if name in tree:
            remove_for_sure(self._vm, name)
        disk = {"id": name, "path": self._images[name], "image_type": "Raw"}
        self._vm.vmm.put("vm.add-disk", disk, expect=200)

    def check(self) -> tuple[set[str], set[str]]:
        """Nothing is lost. Return the disks that are to be there, and all that is."""
        info = self._vm.info()
        present, tree = {disk["id"] for disk in info["config"]["disks"]}, set(info["device_tree"])
        assert tree >= present
        return present, tree

    def end(self) -> None:
        """Have the guest do all that is left over, and remove what it is to have then."""
        present, _ = self.check()
        last, *others = sorted(self._images)
        for name in (*(name for name in others if name not in present), last):
            remove_for_sure(self._vm, name)
        self.check()
        for name in others:
            remove_for_sure(self._vm, name)
