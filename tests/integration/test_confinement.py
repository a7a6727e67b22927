"""What QEMU's process cannot do while a guest runs, looked at from outside and tried from within."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from support.booted import booting, vm_config
from support.deadline import GUEST_S
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

FILTERED = 2  # SECCOMP_MODE_FILTER
# By number, so that the C library does not stand between.
DENIED = {"fork": "57", "execve": "59, 0, 0, 0", "setuid": "105, 0", "setpriority": "141, 0, 0, 0"}
GETPID = "39"
SIGSYS = signal.SIGSYS.value


def status_of(pid: int, name: str) -> int:
    """Return a number of /proc/PID/status."""
    found = re.search(rf"^{name}:\s*(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        pytest.param([], FILTERED, id="default"),
        pytest.param(["--seccomp", "errno"], FILTERED, id="errno"),
        pytest.param(["--seccomp", "false"], 0, id="false"),
        pytest.param(["--seccomp", "log"], 0, id="log"),
    ],
)
def test_every_thread_of_qemu_is_behind_the_filter_unless_told_otherwise(
    flags: list[str], mode: int, tmp_path: Path
) -> None:
    with booting(tmp_path, vm_config(), *flags, shell=None) as vm:
        threads = [int(name) for name in os.listdir(f"/proc/{vm.qemu_pid()}/task")]
        assert len(threads) > 1
        assert {status_of(thread, "Seccomp") for thread in threads} == {mode}
        assert {status_of(thread, "NoNewPrivs") for thread in threads} == {int(mode == FILTERED)}


@pytest.mark.parametrize("name", DENIED)
def test_qemu_that_starts_a_program_or_gains_rights_is_refused_or_ended(name: str, tmp_path: Path) -> None:
    gdb = shutil.which("gdb")
    if gdb is None:
        pytest.skip("gdb is missing")
    with booting(tmp_path, vm_config(), "--no-shutdown", shell=None) as vm:
        pid = vm.qemu_pid()
        calls = [f"print (long)syscall({numbers})" for numbers in (GETPID, DENIED[name])]
        told = subprocess.run(
            [gdb, "-nx", "-batch", *(word for call in calls for word in ("-ex", call)), "-p", str(pid)],
            capture_output=True,
            text=True,
            cwd=tmp_path,  # where its core goes
            timeout=GUEST_S,
            check=False,  # gdb itself may not survive what it has done
        ).stdout
        answers = re.findall(r"^\$\d+ = (-?\d+)$", told, re.MULTILINE)
        assert answers[0] == str(pid), told
        if answers[1:] != ["-1"]:
            wait_until(lambda: f"signal {SIGSYS}" in vm.server.stderr, "QEMU is ended", timeout_s=GUEST_S)
