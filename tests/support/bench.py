"""One server per engine that is taken from state to state, for tables with a row per call and state.

States, as in rest.md section 8: `N` nothing, `C` a config only, `R` a running VM, `P` a paused VM, `F` a VM
whose final boot step failed. What a row calls is in `CALLS`; its first word is the command.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from cloudvmm import api
from cloudvmm.config.form import decode
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.vmm import VmmThread
from cloudvmm.engine.fake import FakeEngine
from cloudvmm.engine.qemu import QemuEngine
from support.accelerator import accelerator
from support.fork import CloneVm
from support.rest import Reply
from support.server import Server
from support.vm import MIB, EngineChoice
from support.vmm import error_words
from support.wait import wait_until

END_S: Final = 10.0
RAM_BYTES: Final = 256 * MIB
STATE_WORDS: Final = {"C": "Created", "R": "Running", "P": "Paused", "F": "Created"}


class Bench:
    """Owns the server. A VM that a row only asked, and that refused, serves the next row too."""

    def __init__(self, engine: EngineChoice, folder: Path) -> None:
        self.engine = engine
        self.folder = folder
        self.server = Server(folder / "server", engine.flags)
        self.server.wait_ready()
        self.vmm = self.server.vmm
        self.files = itertools.count()
        self._state: str | None = "N"
        self._saved: str | None = None
        for name, size in (("image", MIB), ("other", MIB), ("pmem", 2 * MIB)):
            (folder / name).write_bytes(bytes(size))
        (folder / "pmem").chmod(0o666)  # QEMU opens it itself, as whoever it is

    def config(self) -> dict[str, Any]:
        """Return the config of states C, R and P: a disk `d0`, a zone `z`, one vCPU of two."""
        zone = {"id": "z", "size": RAM_BYTES, "shared": True, "hotplug_size": 128 * MIB}
        memory: dict[str, Any] = {"size": 0, "hotplug_method": "VirtioMem", "zones": [zone]}
        return {
            "cpus": {"boot_vcpus": 1, "max_vcpus": 2},
            "memory": memory,
            "payload": self.engine.payload(self.folder),
            "disks": [{"id": "d0", "path": str(self.folder / "image"), "image_type": "Raw"}],
            "console": {"mode": "Null"},
            "serial": {"mode": "Null"},
        }

    def reach(self, state: str) -> None:
        """Bring the server into `state`."""
        if state == self._state:
            return
        self.vmm.put("vm.delete")
        self._state = state
        if state == "N":
            return
        config = self.config()
        if state == "F":
            config["payload"] = {**config["payload"], "kernel": "/no/such/kernel"}
        self.vmm.put("vm.create", config)
        if state == "F":
            self.vmm.put("vm.boot", expect=500)
        elif state in "RP":
            self.vmm.put("vm.boot")
        if state == "P":
            self.vmm.put("vm.pause")

    def create(self, **changes: Any) -> None:
        """Have a config that is that of state C but for `changes`; no row is served from it."""
        self.vmm.put("vm.delete")
        self.forget_state()
        self.vmm.put("vm.create", {**self.config(), **changes})

    def call(self, name: str) -> Reply:
        """Do what `CALLS` says, which may leave the server in any state unless it is refused."""
        method, command, body = CALLS[name]
        return self.exchange(method, command, body(self) if body is not None else None)

    def exchange(self, method: str, command: str, body: Any) -> Reply:
        """Send any request, which may leave the server in any state unless it is refused."""
        reply = self.vmm.exchange(method, command, body)
        if reply.status < 300 and method != "GET":
            self.forget_state()
        if reply.status < 300 and command == "vm.send-migration":
            # Nobody is there to receive it: the VM is back soon.
            wait_until(
                lambda: self.vmm.exchange("GET", "vm.counters").status == 200,
                "the VM is back",
                timeout_s=END_S,
            )
        if reply.status < 300 and command == "vm.fork":
            for told in msgspec.json.decode(reply.body)["clones"]:
                CloneVm(told, has_shell=False).end()  # it keeps the images below its own from being written
        return reply

    def forget_state(self) -> None:
        """The server is in a state that no row asked for: `reach` begins anew."""
        self._state = None

    def has_state(self, state: str) -> bool:
        """Tell whether the server is in `state` as far as `vm.info` shows it."""
        reply = self.vmm.exchange("GET", "vm.info")
        if state == "N":
            return reply.status == 404
        info = msgspec.json.decode(reply.body)
        return info["state"] == STATE_WORDS[state] and ("device_tree" in info) == (state != "C")

    def server_descriptors(self) -> list[Path]:
        return list(Path(f"/proc/{self.server.pid}/fd").iterdir())

    def new_path(self, kind: str) -> str:
        return str(self.folder / f"{kind}{next(self.files)}")

    def new_folder(self, kind: str) -> str:
        path = self.new_path(kind)
        os.mkdir(path)
        return path

    def saved(self) -> str:
        """Return a folder with a snapshot of the same engine, made by a VMM in this process."""
        if self._saved is None:
            folder = self.new_folder("saved")
            is_fake = self.engine.name == "fake"
            vmm = VmmThread(FakeEngine() if is_fake else QemuEngine(accel=accelerator()))
            vm_config = decode(msgspec.json.encode(self.config()), VmConfig)
            ends = vmm.api_evt, vmm.api_sender
            api.vm_create(*ends, vm_config)
            api.vm_boot(*ends)
            api.vm_pause(*ends)
            api.vm_snapshot(*ends, api.VmSnapshotConfig(destination_url=f"file://{folder}"))
            api.vmm_shutdown(*ends)
            assert vmm.join(END_S)
            vmm.close()
            self._saved = folder
        return self._saved

    def close(self) -> None:
        self.server.check_end()


def texts(reply: Reply) -> list[str]:
    """Return the error chain of `reply`, nothing for a success."""
    return error_words(reply) if reply.status >= 400 else []


Body = Callable[[Bench], Any]


def _is(body: Any) -> Body:
    return lambda _bench: body


CALLS: Final[dict[str, tuple[str, str, Body | None]]] = {
    "vmm.ping": ("GET", "vmm.ping", None),
    "vm.info": ("GET", "vm.info", None),
    "vm.counters": ("GET", "vm.counters", None),
    "vmm.jobs": ("GET", "vmm.jobs", None),
    "vmm.cancel-job": ("PUT", "vmm.cancel-job", _is({"id": 999})),
    **{
        name: ("PUT", name, None)
        for name in (
            "vmm.shutdown",
            "vm.boot",
            "vm.delete",
            "vm.shutdown",
            "vm.reboot",
            "vm.pause",
            "vm.resume",
            "vm.power-button",
            "vm.nmi",
            "vm.cancel-migration",
            "vm.cancel-snapshot",
        )
    },
    "vm.create": ("PUT", "vm.create", Bench.config),
    "vm.snapshot": (
        "PUT",
        "vm.snapshot",
        lambda bench: {"destination_url": f"file://{bench.new_folder('snapshot')}"},
    ),
    "vm.fork": ("PUT", "vm.fork", lambda bench: {"directory": bench.new_folder("clones")}),
    "vm.restore": ("PUT", "vm.restore", lambda bench: {"source_url": f"file://{bench.saved()}"}),
    "vm.coredump": (
        "PUT",
        "vm.coredump",
        lambda bench: {"destination_url": f"file://{bench.new_path('core')}"},
    ),
    "vm.send-migration": (
        "PUT",
        "vm.send-migration",
        lambda bench: {"destination_url": f"unix:{bench.folder}/nobody"},
    ),
    "vm.receive-migration": ("PUT", "vm.receive-migration", _is({"receiver_url": "nowhere:/x"})),
    "vm.receive-migration unix": (
        "PUT",
        "vm.receive-migration",
        _is({"receiver_url": "unix:/no/such/folder/socket"}),
    ),
    "vm.resize": ("PUT", "vm.resize", _is({"desired_vcpus": 2})),
    "vm.resize-zone": ("PUT", "vm.resize-zone", _is({"id": "z", "desired_ram": RAM_BYTES + 2 * MIB})),
    "vm.resize-zone unknown": ("PUT", "vm.resize-zone", _is({"id": "x", "desired_ram": RAM_BYTES})),
    "vm.resize-disk": ("PUT", "vm.resize-disk", _is({"id": "d0", "desired_size": 2 * MIB})),
    "vm.resize-disk unknown": ("PUT", "vm.resize-disk", _is({"id": "x", "desired_size": 2 * MIB})),
    "vm.remove-device": ("PUT", "vm.remove-device", _is({"id": "d0"})),
    "vm.remove-device unknown": ("PUT", "vm.remove-device", _is({"id": "x"})),
    "vm.add-device": ("PUT", "vm.add-device", _is({"path": "/none"})),
    "vm.add-user-device": ("PUT", "vm.add-user-device", _is({"socket": "/s"})),
    "vm.add-disk": ("PUT", "vm.add-disk", lambda bench: {"path": f"{bench.folder}/other"}),
    "vm.add-disk used id": (
        "PUT",
        "vm.add-disk",
        lambda bench: {"path": f"{bench.folder}/other", "id": "d0"},
    ),
    "vm.add-fs": ("PUT", "vm.add-fs", _is({"tag": "t", "socket": "/s"})),
    "vm.add-generic-vhost-user": (
        "PUT",
        "vm.add-generic-vhost-user",
        _is({"socket": "/s", "queue_sizes": [64, 64], "device_type": 26}),
    ),
    "vm.add-net": ("PUT", "vm.add-net", _is({"tap": "tap-of-bench"})),
    "vm.add-pmem": ("PUT", "vm.add-pmem", lambda bench: {"file": f"{bench.folder}/pmem"}),
    "vm.add-vdpa": ("PUT", "vm.add-vdpa", _is({"path": "/dev/vhost-vdpa-none", "num_queues": 1})),
    "vm.add-vsock": ("PUT", "vm.add-vsock", lambda bench: {"cid": 3, "socket": f"{bench.folder}/v"}),
}
