"""What a kind of device must say of itself to go through the matrix of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from support.booted import Booted
from support.deadline import GUEST_S


class DeviceCase:
    """Makes devices of one kind in `folder`, and looks at them from inside the guest.

    `command` adds one, `member` is where a configuration has it, `is_single` where that is no list.
    `changes` are what the VM's configuration needs besides. `stays` are words of the refusal where such a
    device cannot be removed, `unsaved` where a guest that has it cannot be saved. `oldest` is the first
    version of QEMU that can have it, and `refusal` are words of what an older one answers.
    """

    name: ClassVar[str]
    command: ClassVar[str]
    member: ClassVar[str]
    is_single: ClassVar[bool] = False
    changes: ClassVar[dict[str, Any]] = {}
    stays: ClassVar[str | None] = None
    unsaved: ClassVar[str | None] = None
    oldest: ClassVar[tuple[int, int]] = (7, 2)
    refusal: ClassVar[str] = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def device(self, device_id: str) -> dict[str, Any]:
        """Make what the device `device_id` stands on, or make it anew; return its configuration, id included.

        Called before the device is there: at first, and before it is added again.
        """
        raise NotImplementedError

    def before_reboot(self) -> None:
        """Make ready again what serves a device once only; the VM is about to be rebooted."""

    def check(self, vm: Booted, device_id: str, bdf: str) -> None:
        """Fail unless the guest has the device at `bdf`, and it does its work, seen from both sides."""
        raise NotImplementedError

    def close(self) -> None:
        """End every back end that was started; the VM is gone. Idempotent."""


def pci_folder(bdf: str) -> str:
    """Return the guest's folder of the PCI device at `bdf`."""
    return f"/sys/bus/pci/devices/{bdf}"


def find(vm: Booted, bdf: str, kind: str) -> str:
    """Return the guest's name of the device at `bdf` in its class ("block", "net"), once a driver has it."""
    glob = f"{pci_folder(bdf)}/virtio*/{kind}/*"
    return vm.run(f"until ls -d {glob} 2>/dev/null; do usleep 20000; done", timeout_s=GUEST_S).split("/")[-1]
