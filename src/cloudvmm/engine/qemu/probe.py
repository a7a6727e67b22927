"""Which accelerator to use: KVM where a guest really runs on it, else QEMU's own emulation (TCG).

A /dev/kvm can open, answer the right API version, run simple code and still hang every stock guest. So a
probe guest (`probe_guest.py`) runs under KVM and its verdict decides. The verdict is cached on disk for
this boot of this kernel, this device and this QEMU, if guest or QEMU gave it: that time or descriptors ran
out says something about a busy host, not about KVM. That the device is there and may be opened is looked at
each time.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Literal

import msgspec

from cloudvmm.engine.base import EngineError, EngineTimeout, MachineGone
from cloudvmm.engine.qemu import cache
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.cpu import kvm_accelerator
from cloudvmm.engine.qemu.fact import KVM_CPU_MODEL, KVM_DEVICE, Accelerator, QemuFacts
from cloudvmm.engine.qemu.process import ChildProcess, ProcessSpec
from cloudvmm.engine.qemu.qmp import QmpClient, offer_handshake

START_TIMEOUT_S = 10.0
RUN_TIMEOUT_S = 5.0
_FORMAT = "2"
_SHORTAGES = ("Cannot allocate memory", "Too many open files", "temporarily unavailable", "resource busy")

WantedAccelerator = Literal["auto", "kvm", "tcg"]


class AcceleratorUnusable(EngineError):
    """KVM was asked for and no guest runs on it; the text says why."""


class Verdict(msgspec.Struct, frozen=True):
    """`reason` is a sentence without a full stop. `is_final` means that asking again is of no use."""

    usable: bool
    reason: str
    is_final: bool = True


def choose_accelerator(
    wanted: WantedAccelerator,
    facts: QemuFacts,
    *,
    kvm_device: str = KVM_DEVICE,
    attempt: Attempt | None = None,
) -> tuple[Accelerator, str]:
    """Return the accelerator and the reason. Blocking: seconds at worst, where the cache does not know.

    :raises AcceleratorUnusable: `wanted` is ``kvm`` and KVM does not run a guest.
    :raises MachineGone: `attempt` was aborted.
    """
    if wanted == "tcg":
        return "tcg", "TCG was asked for"
    verdict = judge_kvm(facts, kvm_device=kvm_device, attempt=attempt)
    if verdict.usable:
        return "kvm", verdict.reason
    if wanted == "kvm":
        raise AcceleratorUnusable(f"KVM was asked for but cannot be used: {verdict.reason}")
    return "tcg", verdict.reason


def judge_kvm(facts: QemuFacts, *, kvm_device: str = KVM_DEVICE, attempt: Attempt | None = None) -> Verdict:
    """Say whether a stock guest would run under KVM here."""
    if obstacle := _obstacle(kvm_device):
        return Verdict(False, obstacle)
    try:
        subject = _subject(facts, kvm_device)
    except OSError:
        return _probe_kvm(facts, kvm_device, attempt)
    verdict = cache.load(subject, Verdict)
    if verdict is None:
        verdict = _probe_kvm(facts, kvm_device, attempt)
        if verdict.is_final:
            cache.store(subject, verdict)
    return verdict


def run_probe_guest(
    facts: QemuFacts,
    accelerator: str,
    cpu_model: str,
    *,
    run_timeout_s: float = RUN_TIMEOUT_S,
    attempt: Attempt | None = None,
) -> Verdict:
    """Run the probe guest with ``-accel accelerator`` and ``-cpu cpu_model`` and say what it did.

    Blocking for 60 ms where all is well, for `run_timeout_s` and a second where the guest hangs.

    :raises MachineGone: `attempt` was aborted.
    """
    attempt = attempt or Attempt()
    from cloudvmm.engine.qemu import probe_guest  # needed once per boot of the host

    with contextlib.ExitStack() as undo:
        image = _memory_file(undo, probe_guest.firmware_image())
        stages = _memory_file(undo, b"")
        ours, theirs = socket.socketpair()
        client = QmpClient(ours)
        undo.callback(client.close)
        undo.callback(theirs.close)
        offer_handshake(ours)
        argv = _probe_arguments(facts.binary, accelerator, cpu_model, image, stages, theirs.fileno())
        process = ChildProcess(ProcessSpec(argv, fds=[image, stages, theirs.fileno()]))
        undo.callback(process.close)
        theirs.close()
        attempt.watch(process)
        how, is_final = _watch(client, process, run_timeout_s)
        attempt.check()
        if not how and process.exit_status() == probe_guest.SUCCESS_STATUS:
            return Verdict(True, "A probe guest ran to its end")
        how = how or process.ending()
        reached = os.pread(stages, 64, 0).decode("ascii", errors="replace")
        stage = probe_guest.STAGES.get(reached[-1:])
        where = f"got no further than {stage}" if stage else "did not start"
        is_final = is_final and not any(shortage in how for shortage in _SHORTAGES)
        return Verdict(False, f"A probe guest {where}: {how.splitlines()[0]}", is_final)


def _obstacle(device: str) -> str | None:
    """Return why `device` cannot even be opened, or None."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"There is no {device}"
    except PermissionError:
        return f"{device} may not be opened by this user (is it in the group kvm?)"
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return None


def _subject(facts: QemuFacts, device: str) -> cache.Subject:
    status = os.stat(device)
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    identity = [device, str(status.st_dev), str(status.st_ino), str(status.st_rdev)]
    return cache.about_program("kvm", facts.binary, _FORMAT, os.uname().release, boot_id, *identity)


def _probe_kvm(facts: QemuFacts, device: str, attempt: Attempt | None) -> Verdict:
    try:
        verdict = run_probe_guest(facts, kvm_accelerator(device), KVM_CPU_MODEL, attempt=attempt)
    except MachineGone:
        raise  # aborted: that says nothing about KVM
    except (EngineError, OSError) as error:
        return Verdict(False, f"A probe guest could not be run under KVM: {error}", is_final=False)
    return msgspec.structs.replace(verdict, reason=f"{verdict.reason} (under KVM on {device})")


def _probe_arguments(
    binary: str, accelerator: str, cpu_model: str, image_fd: int, stages_fd: int, qmp_fd: int
) -> list[str]:
    return [
        binary,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"),
        *("-machine", "pc", "-m", "16M"),
        *("-accel", accelerator),
        *("-cpu", cpu_model),
        *("-bios", f"/proc/self/fd/{image_fd}"),
        *("-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"file,id=stages,path=/proc/self/fd/{stages_fd}"),
        *("-device", "isa-debugcon,iobase=0xe9,chardev=stages"),
        *("-device", "isa-debug-exit,iobase=0xf4"),
    ]


def _watch(client: QmpClient, process: ChildProcess, run_timeout_s: float) -> tuple[str, bool]:
    """Let the guest run. Return what happened, nothing where QEMU has ended by itself, and whether it would
    happen again.
    """
    try:
        client.handshake(timeout_s=START_TIMEOUT_S)
        client.execute("cont")
        # QEMU stops a guest that the accelerator cannot run and waits for somebody to look at it.
        client.wait_event("STOP", timeout_s=run_timeout_s)
        return process.complaint() or "QEMU stopped it", True
    except EngineTimeout:
        return f"it did not end within {run_timeout_s:g} s", False
    except MachineGone:
        process.wait(timeout_s=5)
        return "", process.exit_status() is not None  # a signal came from somebody else


def _memory_file(undo: contextlib.ExitStack, content: bytes) -> int:
    fd = os.memfd_create("probe", os.MFD_CLOEXEC)
    undo.callback(os.close, fd)
    os.write(fd, content)
    return fd
