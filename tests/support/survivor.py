"""A guest whose managers are killed and started again on one state folder, and what must be so each time."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from support.attack import Call, bare_config, spend
from support.booted import Booted, booting, make_image, vm_config
from support.deadline import GUEST_S, HOST_S
from support.process import ProcessId, identify
from support.removal import remove_for_sure
from support.server import Server, process_of
from support.vm import choose_engine
from support.wait import wait_until

MIB = 1024 * 1024
FIRST_MOMENT_S = 0.0
LAST_MOMENT_S = 0.25
LAST_BOOT_MOMENT_S = 0.6
LAST_START_S = 1.0
DISK = "_extra"
PCI = "/sys/bus/pci/devices"
VIRTIO = "0x1af4"  # who makes such devices
Info = dict[str, Any]


class Survivor:
    """Owns nothing: `booted` has the server, whose folder for state is `state`."""

    def __init__(self, booted: Booted, state: Path, seed: int) -> None:
        self.booted = booted
        self.state = state
        self.random = random.Random(seed)
        self.outcomes: dict[str, set[str]] = {}
        self.adoptions_s: list[float] = []
        self.boot_id = self.ask("cat /proc/sys/kernel/random/boot_id")
        self.qemu = self.find_qemu()

    def ask(self, script: str) -> str:
        return self.booted.run(script, timeout_s=GUEST_S)

    def find_qemu(self) -> ProcessId:
        return process_of(int((self.state / "pid").read_text().split()[0]))

    def info(self) -> Info:
        return self.booted.vmm.get("vm.info")

    def settled_info(self) -> Info:
        """Return `vm.info` once the BARs of all its devices are in it."""

        def look() -> Info | None:
            info = self.info()
            wrappers = [
                node for node in info["device_tree"].values() if node["id"].startswith("_virtio-pci-")
            ]
            return info if all(node["resources"] for node in wrappers) else None

        return wait_until(look, "the BARs in vm.info", timeout_s=GUEST_S)

    def replace_manager(self) -> None:
        """Kill the manager and start another."""
        self.booted.server.kill()
        self.adoptions_s.append(self.booted.server.restart())

    def strike_starts(self) -> None:
        """Kill the manager, and then others at seeded moments of their starts, before one may live."""
        self.booted.server.kill()
        for _ in range(self.random.randint(1, 3)):
            self.booted.server.start_again()
            spend(self.random.uniform(FIRST_MOMENT_S, LAST_START_S))
            self.booted.server.kill()
        self.adoptions_s.append(self.booted.server.restart())

    def strike(self, command: str, body: Any = None, *, method: str = "PUT") -> None:
        """Kill the manager at a seeded moment of a command, and start another."""
        call = Call(self.booted.server.socket_path, method, command, body)
        spend(self.random.uniform(FIRST_MOMENT_S, LAST_MOMENT_S), unless=lambda: call.is_over)
        self.booted.server.kill()
        reply = call.outcome(timeout_s=HOST_S)
        self.adoptions_s.append(self.booted.server.restart())
        outcome = "no answer" if reply is None else str(reply.status)
        self.outcomes.setdefault(command, set()).add(outcome)

    def check(self) -> Info:
        """The guest is the same, in the same QEMU; config and tree agree."""
        assert self.find_qemu() == self.qemu
        assert self.qemu.is_alive()
        info = wait_until(self._idle_info, "the VM is settled", timeout_s=GUEST_S)
        config, tree = info["config"], info["device_tree"]
        for device_id in device_ids(config):
            assert device_id in tree, (device_id, sorted(tree))
        return info

    def check_guest(self) -> None:
        """The guest has the devices, the vCPUs and the memory that `vm.info` tells of, and no others."""
        found: list[str] = []

        def is_as_told() -> bool:
            found[:] = self._differences()
            return not found

        try:
            wait_until(is_as_told, "the guest has what it is to have", timeout_s=GUEST_S)
        except AssertionError as error:
            error.add_note(f"{found}\n{self.ask('dmesg | tail -n 40')}")
            raise

    def _differences(self) -> list[str]:
        info, found = self.info(), []
        nodes = info["device_tree"].values()
        told = {node["pci_bdf"] for node in nodes if node.get("pci_bdf")}
        has = set(
            self.ask(f"cd {PCI}; for d in *; do grep -qs {VIRTIO} $d/vendor && echo $d; done; :").split()
        )
        found += [f"{bdf} in the guest alone" for bdf in has - told]
        found += [f"{bdf} not in the guest" for bdf in told - set(self.ask(f"ls {PCI}").split())]
        vcpus = int(self.ask("ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l"))
        if vcpus != info["config"]["cpus"]["boot_vcpus"]:
            found.append(f"{vcpus} vCPUs in the guest")
        zones = info["config"]["memory"].get("zones") or ()
        wanted = sum(zone["size"] + (zone.get("hotplugged_size") or 0) for zone in zones)
        if zones and info["memory_actual_size"] != wanted - (info["config"].get("balloon") or {}).get(
            "size", 0
        ):
            found.append(f"{info['memory_actual_size']} bytes of memory in the guest")
        return found

    def settle(self) -> None:
        """Have the guest run, without the extra disk."""
        info = self.check()
        if info["state"] == "Paused":
            self.booted.vmm.put("vm.resume")
        if DISK in info["device_tree"]:
            remove_for_sure(self.booted, DISK)
        assert self.ask("cat /proc/sys/kernel/random/boot_id") == self.boot_id

    def boot_again(self) -> None:
        """Boot the VM, which is off, and know its guest."""
        self.booted.vmm.put("vm.boot")
        self.booted.open_shell()
        self.booted.wait_ready()
        self.boot_id, self.qemu = self.ask("cat /proc/sys/kernel/random/boot_id"), self.find_qemu()

    def _idle_info(self) -> Info | None:
        """Return `vm.info` once what was to be finished is: whoever changes something comes behind that."""
        reply = self.booted.vmm.exchange("PUT", "vm.resize", {})
        return self.info() if reply.status == 204 else None


class Lives:
    """A VM whose guest nobody waits for, made and ended by managers that are killed meanwhile."""

    def __init__(self, home: Path, seed: int, **changes: Any) -> None:
        engine = choose_engine("qemu")
        self.adoptions_s: list[float] = []
        self._random = random.Random(seed)
        self._log = home / "serial.log"
        self._state = home / "state"
        serial = {"mode": "File", "file": str(self._log)}
        self._config = bare_config(engine, home, serial=serial, **changes)
        flags = [*engine.flags, "--no-shutdown", "--state-dir", str(self._state)]
        self._server = Server(home / "server", flags)
        self._server.wait_ready()

    def strike(self, command: str) -> None:
        """Kill the manager at a seeded moment of a command that is in order, and start another."""
        self._prepare(command)
        call = Call(
            self._server.socket_path, "PUT", command, self._config if command == "vm.create" else None
        )
        spend(self._random.uniform(FIRST_MOMENT_S, LAST_BOOT_MOMENT_S), unless=lambda: call.is_over)
        self._server.kill()
        call.outcome(timeout_s=HOST_S)
        self.adoptions_s.append(self._server.restart())
        wait_until(self._is_whole, f"one QEMU, or none, behind {command}", timeout_s=HOST_S)

    def boot(self) -> None:
        self._server.vmm.put("vm.create", self._config)
        self._server.vmm.put("vm.boot")

    def info(self) -> Info:
        return self._server.vmm.get("vm.info")

    def events(self) -> list[str]:
        """Return "source/event" of all events that there were, under every manager."""
        lines = (self._state / "events").read_bytes().splitlines()[1:]
        told = [msgspec.json.decode(line) for line in lines]
        return [f"{event['source']}/{event['event']}" for event in told]

    def helpers(self) -> set[ProcessId]:
        """Return the helper programs that outlive their manager, and are alive."""
        numbers = [int(path.read_text().split()[0]) for path in self._state.glob("helper-*.pid")]
        return {who for who in map(identify, numbers) if who is not None and who.is_alive()}

    def replace_manager(self, *, with_qemu: bool = False) -> None:
        """Kill the manager, and QEMU too where that is asked for, and start another manager."""
        self._server.kill()
        if with_qemu:
            qemu = process_of(*self._qemus())
            qemu.kill()
            wait_until(lambda: not qemu.is_alive(), "QEMU is gone", timeout_s=HOST_S)
        self._server.restart()

    def close(self) -> None:
        self._server.vmm.put("vm.delete")
        wait_until(lambda: not self._qemus(), "no QEMU is left", timeout_s=HOST_S)
        self._server.check_end()

    def _prepare(self, command: str) -> None:
        """Have a VM in the state that `command` is for, without a kill."""
        vmm = self._server.vmm
        state = self._state_word()
        if command == "vm.create":
            vmm.put("vm.delete")
        elif state == "":
            vmm.put("vm.create", self._config)
        if command in ("vm.reboot", "vm.shutdown") and self._state_word() == "Created":
            vmm.put("vm.boot")
        if command == "vm.boot" and self._state_word() != "Created":
            vmm.put("vm.shutdown")

    def _state_word(self) -> str:
        reply = self._server.vmm.exchange("GET", "vm.info")
        return "" if reply.status == 404 else str(msgspec.json.decode(reply.body)["state"])

    def _is_whole(self) -> bool:
        self._server.vmm.exchange("PUT", "vm.resize", {})  # comes behind what is to be finished
        qemus = self._qemus()
        if self._state_word() not in ("Running", "Paused"):
            return not qemus
        return qemus == [int((self._state / "pid").read_text().split()[0])]

    def _qemus(self) -> list[int]:
        return qemus_about(self._log)


def device_ids(config: dict[str, Any]) -> list[str]:
    """Return the ids of all devices that can come and go."""
    single = [config["vsock"]] if config.get("vsock") else []
    several = [device for kind in ("disks", "net", "fs", "pmem") for device in config.get(kind) or ()]
    return [device["id"] for device in (*several, *single)]


def qemus_about(path: Path) -> list[int]:
    """Return the pids of all QEMUs, whoever's children they are, with `path` or a file below it open."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            program = os.path.basename(cmdline.read_bytes().split(b"\0")[0])
            if program.startswith(b"qemu-system") and has_open(cmdline.parent, path):
                found.append(int(cmdline.parent.name))
    return found


def has_open(process: Path, path: Path) -> bool:
    """Tell whether a process, by its folder below /proc, has `path` or a file below that open."""
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed under our eyes
            if Path(os.readlink(link)).is_relative_to(path):
                return True
    return False


@contextlib.contextmanager
def surviving(folder: Path, seed: int, *flags: str, **changes: Any) -> Iterator[Survivor]:
    """A booted guest with a disk and a balloon; `folder` has an image for another disk, extra.raw."""
    make_image(folder / "root.raw", MIB)
    make_image(folder / "extra.raw", 2 * MIB)
    config = vm_config(
        **{
            "disks": [{"id": "_root", "path": str(folder / "root.raw"), "image_type": "Raw"}],
            "balloon": {"size": 0},
            "memory": {"size": 256 * MIB, "hotplug_size": 256 * MIB, "shared": True},
            **changes,
        }
    )
    state = folder / "state"
    with booting(folder, config, "--no-shutdown", "--state-dir", str(state), *flags) as booted:
        survivor = Survivor(booted, state, seed)
        yield survivor
        survivor.booted.vmm.put("vm.delete")
        wait_until(lambda: not survivor.qemu.is_alive(), "QEMU is gone", timeout_s=HOST_S)
