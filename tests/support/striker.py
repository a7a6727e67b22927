"""Managers killed in every command that a guest which runs or stands can be asked for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from support.removal import remove_for_sure
from support.survivor import DISK, MIB, Info, Survivor

NET = "_more-net"
VSOCK = "_vsock"
FS = "_fs"
PMEM = "_pmem"
MOST_PMEM = 12
MOST_VCPUS = 16
# A zone that grows and shrinks: nothing else is resized by `vm.resize-zone`.
ZONE = {"id": "_zone", "size": 256 * MIB, "hotplug_size": 256 * MIB, "shared": True}
INTERFACE = f"cvmm{os.getpid()}"
Request = tuple[str, str, Any]  # method, command, body


class Striker:
    """Chooses by the survivor's seed. `survivor` has the memory of `ZONE`, and room for more vCPUs.

    With `has_virtiofsd` there is the program that serves file systems.
    """

    def __init__(self, survivor: Survivor, *, has_virtiofsd: bool = False) -> None:
        self.survivor = survivor
        self._has_virtiofsd = has_virtiofsd
        self.struck: dict[str, int] = {}
        self._output = survivor.booted.folder / "written"

    def strike(self) -> None:
        """Kill the manager in one of the commands that are in order now; its guest must have gone on."""
        method, command, body = self.survivor.random.choice(self._possible(self.survivor.check()))
        self.struck[command] = self.struck.get(command, 0) + 1
        self.survivor.strike(command, body, method=method)
        self._clear()

    def settle(self) -> None:
        """Have the guest run, without what was added."""
        info = self.survivor.check()
        if info["state"] == "Paused":
            self.survivor.booted.vmm.put("vm.resume")
        for device_id in (NET, VSOCK, FS, DISK):
            if device_id in info["device_tree"]:
                remove_for_sure(self.survivor.booted, device_id)
        self.survivor.settle()
        self.survivor.check_guest()

    def _possible(self, info: Info) -> list[Request]:
        choose = self.survivor.random.choice
        found: list[Request] = [
            *(("GET", command, None) for command in ("vm.info", "vm.counters", "vmm.jobs")),
            ("PUT", "vm.nmi", None),
            ("PUT", "vm.resize", {"desired_balloon": choose([0, 16 * MIB])}),
            ("PUT", "vm.resize-disk", {"id": "_root", "desired_size": choose([1, 2]) * MIB}),
            ("PUT", "vm.resize-zone", {"id": ZONE["id"], "desired_ram": choose([256, 320, 384]) * MIB}),
            ("PUT", "vm.resize", {"desired_vcpus": more_vcpus(info)}),
            *self._of_devices(info["device_tree"]),
        ]
        if info["state"] == "Running":
            missing = f"unix:{self.survivor.booted.folder}/nobody"
            found.append(("PUT", "vm.send-migration", {"destination_url": missing}))
            return [*found, ("PUT", "vm.pause", None)]
        return [
            *found,
            ("PUT", "vm.resume", None),
            ("PUT", "vm.snapshot", {"destination_url": f"file://{self._made_folder()}"}),
            ("PUT", "vm.coredump", {"destination_url": f"file://{self._made_folder()}/core"}),
        ]

    def _of_devices(self, tree: dict[str, Any]) -> list[Request]:
        folder = self.survivor.booted.folder
        additions = {
            DISK: ("vm.add-disk", {"path": str(folder / "extra.raw"), "image_type": "Raw"}),
            NET: ("vm.add-net", {"tap": INTERFACE}),
            VSOCK: ("vm.add-vsock", {"cid": 3, "socket": str(folder / "vsock")}),
        }
        if self._has_virtiofsd:
            (folder / "shared").mkdir(exist_ok=True)
            additions[FS] = ("vm.add-fs", {"tag": "t", "shared_dir": str(folder / "shared")})
        return [
            ("PUT", "vm.remove-device", {"id": device_id})
            if device_id in tree
            else ("PUT", command, {"id": device_id, **body})
            for device_id, (command, body) in additions.items()
        ]

    def _made_folder(self) -> Path:
        self._output.mkdir(exist_ok=True)
        return self._output

    def _clear(self) -> None:
        """What a command that was killed has written is its caller's to remove."""
        shutil.rmtree(self._output, ignore_errors=True)


class Hoarder(Striker):
    """Strikes at what a guest keeps until it is off, and at vCPUs that come and go: it is not saved then."""

    def _possible(self, info: Info) -> list[Request]:
        choose, config = self.survivor.random.choice, info["config"]
        count = config["cpus"]["boot_vcpus"]
        found: list[Request] = [
            ("PUT", "vm.resize", {"desired_vcpus": more_vcpus(info)}),
            ("PUT", "vm.resize", {"desired_vcpus": max(1, count - choose([1, 2]))}),
        ]
        number = len(config.get("pmem") or ())
        if number < MOST_PMEM:
            file = self.survivor.booted.folder / f"pmem{number}"
            with file.open("ab") as image:
                image.truncate(2 * MIB)
            found.append(("PUT", "vm.add-pmem", {"id": f"{PMEM}{number}", "file": str(file)}))
        return found


def more_vcpus(info: Info) -> int:
    """Return one vCPU more than there are, as far as there can be."""
    cpus = info["config"]["cpus"]
    return min(int(cpus["boot_vcpus"]) + 1, int(cpus["max_vcpus"]))
