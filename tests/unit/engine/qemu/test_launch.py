"""How a start of QEMU fails, with scripts in its place."""

from __future__ import annotations

import contextlib
import threading

import pytest

from cloudvmm.engine.base import (
    DeviceError,
    EngineError,
    EngineTimeout,
    MachineGone,
    PayloadError,
    SlotError,
)
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.launch import Attempt, LaunchSpec, launch
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
        spec = LaunchSpec(arguments=[], timeout_s=timeout_s)
        facts = QemuFacts(binary=str(script_path), version=(10, 0, 2))
        try:
            with contextlib.ExitStack() as undo:
                launch(spec, facts, undo, attempt=attempt or Attempt())
        finally:
            before.assert_nothing_added()

    return run


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("-device {}: PCI: slot 3 function 0 not available for virtio-net, in use by virtio-blk", SlotError),
        ("-device virtio-blk-pci,drive=x: No such file or directory", DeviceError),
        ('-blockdev {"driver":"qcow2"}: Image is not in qcow2 format', DeviceError),
        ("could not load kernel", PayloadError),
        ("cannot set up guest memory 'ram0': Cannot allocate memory", EngineError),
    ],
)
def test_words_decide_the_kind_of_error_and_are_its_text(start, words, kind):
    with pytest.raises(EngineError) as caught:
        start(f"cat >&2 <<'END'\nqemu-system-x86_64: warning: old\nqemu-system-x86_64: {words}\nEND\nexit 1")

    assert type(caught.value) is kind
    assert str(caught.value) == words


def test_silent_end_is_told_by_its_status(start):
    with pytest.raises(EngineError, match="^QEMU exited with status 3$"):
        start("exit 3")


def test_qemu_that_never_speaks_is_a_timeout(start):
    with pytest.raises(EngineTimeout):
        start("exec sleep 300", timeout_s=0.2)


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
