"""Starting QEMU with its monitors, and reading its refusal.

Three QMP monitors over inherited socket pairs, so that no path exists in any file system: `control` for the
blocking calls of the worker, `reader` for queries beside them, `events` for the control loop.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

import msgspec

from cloudvmm.engine.base import DeviceError, EngineError, MachineGone, PayloadError, SlotError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.process import ChildProcess, ProcessSpec
from cloudvmm.engine.qemu.qmp import Observer, QmpClient, offer_handshake

# Threads with names: for people who look at them, and for ourselves to see when a dump's thread has ended.
_FIXED_ARGUMENTS = (
    *("-name", "debug-threads=on"),
    *("-nodefaults", "-no-user-config", "-display", "none", "-no-shutdown", "-S"),
)
# No process of its own, no more rights, no other place in the scheduler, no system call that is out of use.
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_DEVICE_OPTIONS = ("-device ", "-blockdev ", "-netdev ", "-chardev ", "-object ", "-add-fd ", "-serial ")
_SANDBOX_WORDS = ("-sandbox ", "failed to install seccomp ")
_SLOT_WORDS = ("PCI: slot ", "PCI: no slot/function available")
# What QEMU's loaders say, in lower case.
_PAYLOAD_WORDS = (
    "could not open kernel file",
    "could not load kernel",
    "invalid kernel header",
    "invalid kernel_file_size",
    "error loading uncompressed kernel",
    "error while loading elf kernel",
    "cannot load x86-64 image",
    "kernel does not fit",
    "kernel too old",
    "error reading initrd",
    "initrd is too large",
    "could not load pc bios",
    "multiboot",
    "rom regions are overlapping",
)


class SandboxError(EngineError):
    """This QEMU, or the kernel, has no seccomp filter."""


class Monitors(msgspec.Struct, frozen=True):
    control: QmpClient
    reader: QmpClient
    events: QmpClient

    def close(self) -> None:
        for client in (self.control, self.reader, self.events):
            client.close()


class LaunchSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`arguments` follow those that are the same for every machine; `fds` are lent.

    With `has_sandbox` QEMU puts itself behind its seccomp filter before the guest runs.
    """

    arguments: Sequence[str]
    has_sandbox: bool
    fds: Sequence[int] = ()
    state_dir: str | None = None
    thp: bool = True
    timeout_s: float


def launch(
    spec: LaunchSpec,
    facts: QemuFacts,
    undo: contextlib.ExitStack,
    *,
    attempt: Attempt,
    observe: Observer | None = None,
) -> tuple[ChildProcess, Monitors]:
    """Blocking. Start QEMU with its vCPUs standing still and return once it answers on every monitor.

    `undo` ends what was started.

    :raises MachineGone: `attempt` was aborted.
    :raises EngineError: QEMU refused; the text is its own words. A `DeviceError`, `SlotError`,
        `PayloadError` or `SandboxError` where the words are about one.
    """
    attempt.check()
    clients: list[QmpClient] = []
    theirs: list[socket.socket] = []
    with contextlib.ExitStack() as lent:
        for _ in range(3):
            near, far = socket.socketpair()
            lent.enter_context(far)
            client = QmpClient(near, observe=observe)
            undo.callback(client.close)
            offer_handshake(near)
            clients.append(client)
            theirs.append(far)
        fds = [far.fileno() for far in theirs]
        sandbox = ("-sandbox", _SANDBOX) if spec.has_sandbox else ()
        argv = [facts.binary, *_FIXED_ARGUMENTS, *sandbox, *_monitor_arguments(fds), *spec.arguments]
        process = ChildProcess(
            ProcessSpec(argv, fds=[*fds, *spec.fds], state_dir=spec.state_dir, thp=spec.thp)
        )
        undo.callback(process.close)
    attempt.watch(process)
    try:
        for client in clients:
            client.handshake(timeout_s=spec.timeout_s)
    except MachineGone:
        process.wait(timeout_s=5)
        attempt.check()
        raise refusal(process) from None
    attempt.check()
    return process, Monitors(*clients)


def refusal(process: ChildProcess) -> EngineError:
    """Return the error that says in QEMU's words why the `process`, which has ended, ended."""
    words = process.complaint() or process.ending()
    text = "\n".join(_without_json(line) for line in words.splitlines())
    if is_about_slot(words):
        return SlotError(text)
    if words.startswith(_DEVICE_OPTIONS):
        return DeviceError(text)
    if words.startswith(_SANDBOX_WORDS):
        return SandboxError(f"{text}; --seccomp false goes without the filter")
    if any(_is_about_payload(line) for line in words.splitlines()):
        return PayloadError(text)
    return EngineError(text)


def is_about_slot(words: str) -> bool:
    """Say whether QEMU's words are about a PCI slot that cannot be had."""
    return any(slot_words in words for slot_words in _SLOT_WORDS)


def _is_about_payload(line: str) -> bool:
    """Say whether a loader complains. A line about an option begins with it and may hold any text of ours."""
    return not line.startswith("-") and any(words in line.lower() for words in _PAYLOAD_WORDS)


def _without_json(line: str) -> str:
    """Return what is said of an option whose argument is JSON, without option and argument."""
    option, _, rest = line.partition(" ")
    if not option.startswith("-") or not rest.startswith("{"):
        return line
    import json  # rare, and msgspec does not say where an object ends

    try:
        _, end = json.JSONDecoder().raw_decode(rest)
    except ValueError:
        return line
    return rest[end:].removeprefix(": ") or line


def _monitor_arguments(fds: Sequence[int]) -> list[str]:
    arguments: list[str] = []
    for name, fd in zip(("control", "reader", "events"), fds, strict=True):
        arguments += ["-chardev", f"socket,id=qmp.{name},fd={fd}"]
        # Not `-mon`, of which QEMU 11 says that it is deprecated: its own successor is none of QEMU 10's.
        arguments += ["-qmp", f"chardev:qmp.{name}"]
    return arguments
