"""The VMM as its reference tells of it, with none of our code: what each call answers, what is then there.

A test walks: it makes the same call to this model and to a server, and compares. Memory is in bytes. The
guest of the model follows at once.
"""

from __future__ import annotations

import copy
from typing import Any, Final, NamedTuple

MIB: Final = 1024 * 1024
BLOCK: Final = 2 * MIB  # by which memory grows and shrinks
RAM: Final = 256 * MIB
HOTPLUG: Final = 128 * MIB
MAX_VCPUS: Final = 4


class Said(NamedTuple):
    """A status, and the last sentence of the error chain; empty after a success."""

    status: int
    sentence: str = ""


DONE: Final = Said(204)
TOLD: Final = Said(200)
NOT_CREATED: Final = Said(404, "VM is not created")
NOT_RUNNING: Final = Said(500, "VM is not running")
ALREADY_CREATED: Final = Said(500, "VM is already created")
NO_CONFIG: Final = Said(404, "VM config is missing")
STILL_RUNNING: Final = Said(500, "Trying to snapshot while VM is running")


class Vm:
    """What was asked for, and what the last boot made of it.

    `counter` numbers the names that are made, and none is made of those that the last boot was `given`, even
    where their disks are gone.
    """

    def __init__(self, vcpus: int, disks: list[str | None]) -> None:
        self.vcpus = vcpus
        self.memory = RAM
        self.hotplugged: int | None = None
        self.disks = disks
        self.state = "Created"
        self.counter = 0
        self.given: set[str | None] = set()

    @property
    def is_alive(self) -> bool:
        return self.state in ("Running", "Paused")

    def next_name(self) -> str:
        """Return the first numbered name that is free; each that is taken uses up its number too."""
        while True:
            name = f"_disk{self.counter}"
            self.counter += 1
            if name not in self.given and name not in self.disks:
                return name

    def boot(self) -> None:
        self.counter = 0
        self.given = set(self.disks)
        for at, name in enumerate(self.disks):
            if name is None:
                self.disks[at] = self.next_name()
        self.state = "Running"


class Model:
    """`vm` is None where there is none. Each method is one call and returns what is to be answered."""

    def __init__(self) -> None:
        self.vm: Vm | None = None
        self.saved: list[Vm] = []

    @property
    def is_alive(self) -> bool:
        return self.vm is not None and self.vm.is_alive

    def create(self, vcpus: int, disks: list[str | None]) -> Said:
        if self.vm is not None:
            return ALREADY_CREATED
        self.vm = Vm(vcpus, disks)
        return DONE

    def boot(self) -> Said:
        if self.vm is None:
            return NO_CONFIG
        if self.vm.is_alive:
            return ALREADY_CREATED
        self.vm.boot()
        return DONE

    def delete(self) -> Said:
        self.vm = None
        return DONE

    def shutdown(self) -> Said:
        if self.vm is None or not self.vm.is_alive:
            return NOT_RUNNING
        self.vm.state = "Created"
        return DONE

    def reboot(self) -> Said:
        if self.vm is None or not self.vm.is_alive:
            return NOT_CREATED
        self.vm.boot()
        return DONE

    def pause(self) -> Said:
        return self._change("Running", "Paused")

    def resume(self) -> Said:
        return self._change("Paused", "Running")

    def _change(self, before: str, after: str) -> Said:
        if self.vm is None or not self.vm.is_alive:
            return NOT_RUNNING
        if self.vm.state != before:
            return Said(500, f"Invalid transition: InvalidStateTransition({after}, {after})")
        self.vm.state = after
        return DONE

    def asks_the_living(self, done: Said) -> Said:
        """Tell what a call says that needs a VM that runs or is paused, and changes nothing."""
        return done if self.vm is not None and self.vm.is_alive else NOT_RUNNING

    def info(self) -> Said:
        return NOT_CREATED if self.vm is None else TOLD

    def add_disk(self, name: str | None) -> tuple[Said, str | None]:
        """Return the name, too, that the disk is to have."""
        if self.vm is None:
            return NOT_CREATED, None
        if name is not None and name in self.vm.disks:
            return Said(409, f"Identifier {name} is not unique"), None
        if not self.vm.is_alive:
            self.vm.disks.append(name)
            return DONE, None
        name = name or self.vm.next_name()
        self.vm.disks.append(name)
        return TOLD, name

    def remove(self, name: str) -> Said:
        if self.vm is None:
            return NOT_CREATED
        if name not in self.vm.disks:
            sentence = f"Failed to find device corresponding to the given identifier: {name}"
            return Said(404, sentence if self.vm.is_alive else f'No device with id "{name}" to remove')
        self.vm.disks.remove(name)
        return DONE

    def resize_disk(self, name: str) -> Said:
        if self.vm is None:
            return NOT_CREATED
        if not self.vm.is_alive:
            return Said(500, "Failed resizing a disk image")
        if name not in self.vm.disks:
            return Said(404, f"Failed to find device corresponding to the given identifier: {name}")
        return DONE

    def resize_vcpus(self, vcpus: int) -> Said:
        if self.vm is None:
            return NOT_CREATED
        if self.vm.is_alive:
            if vcpus == 0:
                return Said(500, "Requested zero vCPUs")
            if vcpus > MAX_VCPUS:
                return Said(500, "Requested vCPUs exceed maximum")
        self.vm.vcpus = vcpus
        return DONE

    def resize_memory(self, size: int) -> Said:
        """:param size: a multiple of `BLOCK`, at most one of them beyond what there is room for."""
        if self.vm is None:
            return NOT_CREATED
        if not self.vm.is_alive:
            self.vm.memory = size
            return DONE
        room = size - self.vm.memory
        if room < 0 or room > HOTPLUG or room == (self.vm.hotplugged or 0):
            return Said(500)
        self.vm.hotplugged = room or None
        return DONE

    def snapshot(self) -> Said:
        if self.vm is None or not self.vm.is_alive:
            return NOT_RUNNING
        if self.vm.state != "Paused":
            return STILL_RUNNING
        self.saved.append(copy.deepcopy(self.vm))
        return DONE

    def restore(self, number: int) -> Said:
        if self.vm is not None:
            return ALREADY_CREATED
        self.vm = copy.deepcopy(self.saved[number])
        self.vm.given = set(self.vm.disks)
        return DONE

    def picture(self) -> dict[str, Any] | None:
        """Return what `picture_of` gives of the same VM's info."""
        if self.vm is None:
            return None
        return {
            "state": self.vm.state,
            "vcpus": self.vm.vcpus,
            "memory": self.vm.memory,
            "hotplugged": self.vm.hotplugged,
            "disks": self.vm.disks,
            "in the tree": sorted(name for name in self.vm.disks if name) if self.vm.is_alive else None,
        }


def picture_of(info: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the part of `vm.info` that the model knows of."""
    if info is None:
        return None
    disks = [disk.get("id") for disk in info["config"].get("disks") or []]
    tree = info.get("device_tree")
    return {
        "state": info["state"],
        "vcpus": info["config"]["cpus"]["boot_vcpus"],
        "memory": info["config"]["memory"]["size"],
        "hotplugged": info["config"]["memory"].get("hotplugged_size"),
        "disks": disks,
        "in the tree": None if tree is None else sorted(name for name in disks if name in tree),
    }
