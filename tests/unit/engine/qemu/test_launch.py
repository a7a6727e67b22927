"""How a start of QEMU fails, with scripts in its place."""

from __future__ import annotations

import contextlib
import sys
import threading
import time

import pytest

from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import (
    ConsoleSink,
    DeviceError,
    EngineError,
    EngineTimeout,
    MachineGone,
    MachineSpec,
    PayloadError,
    SinkKind,
    SlotError,
)
from cloudvmm.engine.qemu import QemuEngine
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.launch import LaunchSpec, SandboxError, launch
from support.leak import Holdings

LONG_S = 20.0


@pytest.fixture
def start(tmp_path):
    """Launch a shell script that stands for QEMU; nothing may be left once the launch has failed."""
    script_path = tmp_path / "qemu-system-x86_64"

    def run(script: str, *, attempt: Attempt | None = None, timeout_s: float = LONG_S) -> None:
        script_path.write_text(f"#!/bin/sh\n{script}\n")
        script_path.chmod(0o755)
        before = Holdings()
        spec = LaunchSpec(arguments=[], has_sandbox=True, timeout_s=timeout_s)
        facts = QemuFacts(binary=str(script_path), version=(10, 0, 2))
        try:
            with contextlib.ExitStack() as undo:
                launch(spec, facts, undo, attempt=attempt or Attempt())
        finally:
            before.assert_nothing_added()

    return run


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        (
            "-device {}: PCI: slot 3 function 0 not available",
            SlotError,
            "PCI: slot 3 function 0 not available",
        ),
        (
            "-device virtio-blk-pci,drive=x: No such file or directory",
            DeviceError,
            "-device virtio-blk-pci,drive=x: No such file or directory",
        ),
        (
            '-blockdev {"driver":"qcow2","x":"}: {"}: Image is not in qcow2 format',
            DeviceError,
            "Image is not in qcow2 format",
        ),
        ('-device {"driver": no JSON', DeviceError, '-device {"driver": no JSON'),
        ("qemu: could not load kernel '/k': bad", PayloadError, "qemu: could not load kernel '/k': bad"),
        ("qemu: could not load PC BIOS '/b'", PayloadError, "qemu: could not load PC BIOS '/b'"),
        (
            "Error loading uncompressed kernel without PVH ELF Note",
            PayloadError,
            "Error loading uncompressed kernel without PVH ELF Note",
        ),
        (
            "Could not access KVM kernel module: Permission denied",
            EngineError,
            "Could not access KVM kernel module: Permission denied",
        ),
        (
            "-smbios type=1,serial=invalid kernel header: Bad",
            EngineError,
            "-smbios type=1,serial=invalid kernel header: Bad",
        ),
        (
            "-machine pc: In-kernel initrd BIOS",
            EngineError,
            "-machine pc: In-kernel initrd BIOS",
        ),
        (
            "cannot set up guest memory 'ram0': Cannot allocate memory",
            EngineError,
            "cannot set up guest memory 'ram0': Cannot allocate memory",
        ),
        (
            "-sandbox on: sandbox support is not enabled",
            SandboxError,
            "-sandbox on: sandbox support is not enabled; --seccomp false goes without the filter",
        ),
        (
            "failed to install seccomp syscall filter in the kernel",
            SandboxError,
            "failed to install seccomp syscall filter in the kernel; --seccomp false goes without the filter",
        ),
    ],
)
def test_words_decide_the_kind_of_error_and_are_its_text(start, words, kind, text):
    with pytest.raises(EngineError) as caught:
        start(f"cat >&2 <<'END'\nqemu-system-x86_64: warning: old\nqemu-system-x86_64: {words}\nEND\nexit 1")

    assert type(caught.value) is kind
    assert str(caught.value) == text


def test_words_about_a_payload_that_was_not_there_are_no_payload_error(tmp_path):
    script = tmp_path / "qemu-system-x86_64"
    script.write_text("#!/bin/sh\necho 'qemu: invalid kernel header' >&2\nexit 1\n")
    script.chmod(0o755)
    engine = QemuEngine(binary=str(script))
    engine._known = QemuFacts(binary=str(script), version=(10, 0, 2))
    off = ConsoleSink(kind=SinkKind.OFF)
    config = VmConfig(memory=MemoryConfig(size=1 << 26), console=ConsoleConfig(mode=ConsoleOutputMode.OFF))
    spec = MachineSpec(vm_config=config, slots={"__rng": 2}, serial=off, console=off, debug_console=off)
    with pytest.raises(EngineError) as caught:
        engine.build(spec)

    assert type(caught.value) is EngineError
    assert str(caught.value) == "qemu: invalid kernel header"


def test_silent_end_is_told_by_its_status(start):
    with pytest.raises(EngineError, match="^QEMU exited with status 3$"):
        start("exit 3")


def test_qemu_that_never_speaks_is_a_timeout(start):
    with pytest.raises(EngineTimeout):
        start("exec sleep 300", timeout_s=0.2)


def test_qemu_that_lets_its_monitors_go_and_lives_is_not_waited_for(start):
    started = time.monotonic()
    with pytest.raises(MachineGone, match="closed the connection"):
        start(f"exec {sys.executable} -c 'import os, time; os.closerange(3, 1024); time.sleep(300)'")
    assert time.monotonic() - started < LONG_S / 2


def test_abort_ends_a_launch_under_way(start):
    attempt = Attempt()
    timer = threading.Timer(0.1, attempt.abort)
    timer.start()

    with pytest.raises(MachineGone):
        start("exec sleep 300", attempt=attempt)
    timer.join()


def test_attempt_aborted_before_starts_nothing(start, tmp_path):
    attempt = Attempt()
    attempt.abort()

    with pytest.raises(MachineGone):
        start(f"touch {tmp_path}/started", attempt=attempt)
    assert not (tmp_path / "started").exists()
