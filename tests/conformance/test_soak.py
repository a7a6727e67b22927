"""VMs that live one life after another leave nothing in their servers, and no call of theirs fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.deadline import BOOT_S
from support.guest import find_guest

SOAK = Path(__file__).parents[2] / "benches" / "soak.py"
SHORT_S = {"fake": 4, "qemu": 8}
LONG_S = 600
DENSE_S = "0.4"  # more than the processors can do: what leaks shows sooner


@pytest.mark.timeout(2 * LONG_S)
@pytest.mark.parametrize("engine", ["fake", pytest.param("qemu", marks=pytest.mark.qemu)])
def test_nothing_leaks_and_nothing_fails(engine: str) -> None:
    if engine == "qemu":
        find_guest()
    seconds = LONG_S if os.environ.get("CLOUDVMM_LONG") else SHORT_S[engine]
    words = ["--engine", engine, "--seconds", str(seconds)]
    if engine == "qemu":
        words += ["--pause", DENSE_S]
    if seconds != LONG_S:
        words += ["--vms", "2"]
    ended = subprocess.run(
        [sys.executable, str(SOAK), *words],
        capture_output=True,
        text=True,
        timeout=seconds + BOOT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "nothing leaked, nothing failed" in ended.stdout
    lived = re.search(r"^(\d+) lives, (\d+) calls", ended.stdout, re.MULTILINE)
    assert lived is not None
    assert int(lived[1]) >= 2
    assert int(lived[2]) >= 10
