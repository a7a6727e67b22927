"""A real guest under a server, for tests that look from inside: one boot may be shared by a whole module.

Unlike the ladder's fixtures these are context managers, so that a fixture of any scope can hold one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloudvmm.guest import FAST_CMDLINE, Guest, GuestNotBuilt, locate
from cloudvmm.guest.shell import GuestShell
from support.deadline import BOOT_S, GUEST_S
from support.guest import find_guest
from support.server import Server, checked
from support.vm import choose_engine
from support.vmm import Vmm
from support.wait import wait_until

MIB = 1024 * 1024
READY_WORDS = "cloudvmm-guest ready"

Config = dict[str, Any]


def default_guest() -> Guest:
    """Return the default guest with all its files; skip the test where it is not built."""
    try:
        return locate()
    except GuestNotBuilt as error:
        pytest.skip(f"The default guest is missing: {error}")


def direct_boot(*words: str) -> Config:
    """Return the payload that boots the default guest fastest, with `words` on its command line too."""
    guest = find_guest()
    cmdline = " ".join((FAST_CMDLINE, *words))
    return {"kernel": guest.kernel, "initramfs": guest.initramfs, "cmdline": cmdline}


def copy_root_disk(folder: Path) -> Path:
    """Return a copy of the default guest's root disk, to be written to."""
    copy = folder / "root.raw"
    shutil.copyfile(default_guest().disk, copy)
    return copy


def make_image(path: Path, size_bytes: int) -> Path:
    """Make an empty raw image."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


class EventFile:
    """What `--event-monitor` has written so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def documents(self) -> list[dict[str, Any]]:
        text = self.path.read_text()
        pieces = text.split("\n\n")
        return [json.loads(piece) for piece in pieces if piece]

    def names(self, *sources: str) -> list[str]:
        """Return "source/event" of each event, of `sources` alone where there are any."""
        return [
            f"{document['source']}/{document['event']}"
            for document in self.documents()
            if not sources or document["source"] in sources
        ]

    def wait(self, name: str, *, count: int = 1, timeout_s: float = BOOT_S) -> None:
        """Return once "source/event" `name` has come `count` times."""
        wait_until(
            lambda: self.names().count(name) >= count, f"event {name}, {count} times", timeout_s=timeout_s
        )


class Booted:
    """A server whose VM has been booted. `shell` talks to the guest over the PTY of one of its consoles."""

    def __init__(self, server: Server, folder: Path, events: EventFile) -> None:
        self.server = server
        self.folder = folder
        self.events = events
        self._shell: GuestShell | None = None
        self._shell_fd = -1

    @property
    def vmm(self) -> Vmm:
        return self.server.vmm

    @property
    def shell(self) -> GuestShell:
        assert self._shell is not None, "This VM has no PTY to talk to its guest"
        return self._shell

    def run(self, script: str, *, timeout_s: float = GUEST_S) -> str:
        """Run `script` in the guest; fail unless it succeeds; return what it printed, last newlines cut."""
        status, output = self.shell.run(script, timeout_s=timeout_s)
        text = output.decode(errors="replace")
        assert status == 0, f"{script!r} in the guest: status {status}: {text}"
        return text.rstrip("\n")

    def tell(self, script: str) -> None:
        """Let the guest begin `script`, which takes the guest down: its answer may come or not."""
        words = base64.b64encode(f"({script}) >/dev/null 2>&1 &".encode())
        assert self.shell  # it is open
        os.write(self._shell_fd, b"run last %s\n" % words)

    def info(self) -> dict[str, Any]:
        return self.vmm.get("vm.info")

    def is_running(self) -> bool:
        """Say so; a VM of the command line may not be there yet."""
        reply = self.vmm.exchange("GET", "vm.info")
        return reply.status == 200 and msgspec.json.decode(reply.body)["state"] == "Running"

    def config(self) -> dict[str, Any]:
        return self.info()["config"]

    def qemu_pid(self) -> int:
        """Return the process id of the guest's QEMU, which must be the only one."""
        (qemu,) = (child for child in self.server.children() if "qemu-system" in child.command)
        return qemu.pid

    def open_shell(self, which: str = "console") -> None:
        """Talk to the guest over the PTY of "serial" or "console"."""
        path = self.config()[which]["file"]
        self.close_shell()
        self._shell_fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._shell = GuestShell(self._shell_fd)

    def wait_ready(self) -> None:
        self.shell.wait_ready(BOOT_S)

    def close_shell(self) -> None:
        if self._shell_fd >= 0:
            os.close(self._shell_fd)
        self._shell_fd, self._shell = -1, None


@contextlib.contextmanager
def serving(
    folder: Path,
    *flags: str,
    pass_fds: Sequence[int] = (),
    has_socket: bool = True,
    succeeds: Booted | None = None,
) -> Iterator[Booted]:
    """Start a server that runs VMs with QEMU; its end, and what it leaves behind, are checked.

    One that `succeeds` another is to take its VM and its place over; until it has, the other answers there.
    A failure inside is not hidden by a failure of that check.
    """
    folder.mkdir(exist_ok=True)
    events = EventFile(folder / "events")
    server = Server(
        folder / "server",
        [*choose_engine("qemu").flags, "--event-monitor", f"path={events.path}", *flags],
        pass_fds=pass_fds,
        has_socket=has_socket,
        succeeds=None if succeeds is None else succeeds.server,
    )
    booted = Booted(server, folder, events)
    with checked(server), contextlib.ExitStack() as undo:
        undo.callback(booted.close_shell)
        if has_socket:
            server.wait_ready()
        yield booted


@contextlib.contextmanager
def booting(folder: Path, config: Config, *flags: str, shell: str | None = "console") -> Iterator[Booted]:
    """Boot a VM of `config` over REST; return once its guest answers on the PTY `shell`, None: at once."""
    with serving(folder, *flags) as booted:
        booted.vmm.put("vm.create", config)
        if shell is not None:
            booted.open_shell(shell)
        booted.vmm.put("vm.boot")
        if shell is not None:
            booted.wait_ready()
        yield booted


def vm_config(**changes: Any) -> Config:
    """Return the config of a VM with one vCPU and 256 MiB, the shell on its console's PTY, with `changes`."""
    config = {
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 256 * MIB},
        "payload": direct_boot(),
        "serial": {"mode": "Null"},
        "console": {"mode": "Pty"},
    }
    return config | changes
