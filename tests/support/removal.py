"""A guest that is to let go of a device, and may have forgotten that it is."""

from __future__ import annotations

import time

from support.booted import Booted
from support.deadline import GUEST_S
from support.wait import wait_until

ASK_AGAIN_S = 5.0


def remove_for_sure(vm: Booted, device_id: str) -> None:
    """Have the guest let go of a device, which may be going already.

    It is asked again and again: one that is told in one breath of a device that has come and is to go, as
    after a pause, takes it up and forgets the rest.
    """
    asked_s = 0.0

    def is_gone() -> bool:
        nonlocal asked_s
        if time.monotonic() > asked_s + ASK_AGAIN_S:
            vm.vmm.exchange("PUT", "vm.remove-device", {"id": device_id})
            asked_s = time.monotonic()
        return device_id not in vm.info()["device_tree"]

    try:
        wait_until(is_gone, f"the device {device_id} is gone", timeout_s=GUEST_S)
    except AssertionError as error:
        error.add_note(vm.run("dmesg | tail -n 40", timeout_s=GUEST_S))
        raise
