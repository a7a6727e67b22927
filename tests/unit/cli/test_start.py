"""What a start loads: whatever it does not need would delay the first answer and stay in memory."""

from __future__ import annotations

import subprocess
import sys

LATE = ("cloudvmm.migration.", "cloudvmm.snapshot.", "cloudvmm.dbus", "cloudvmm.options.operation")
LATE_STEPS = ("hotplug", "resize", "snapshot", "restore", "send", "receive", "coredump")


def loaded_by(statements):
    program = f"import sys, cloudvmm.cli.serve, cloudvmm.cli.flag; {statements}; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    return ended.stdout.split()


def test_start_loads_nothing_that_only_later_commands_need():
    loaded = loaded_by("pass")
    assert "cloudvmm.control.command" in loaded
    assert [name for name in loaded if name.startswith(LATE)] == []
    assert [name for name in LATE_STEPS if f"cloudvmm.control.{name}" in loaded] == []


def test_all_steps_are_there_once_they_are_preloaded():
    loaded = loaded_by("cloudvmm.control.latecomer.preload()")
    assert [name for name in LATE_STEPS if f"cloudvmm.control.{name}" not in loaded] == []
