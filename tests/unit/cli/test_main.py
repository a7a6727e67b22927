"""What the command puts right of what it was started with."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

LONG_S = 20.0


def test_ignored_sigchld_is_not_kept():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        from cloudvmm.cli.main import main

        assert main(["--version"]) == 0
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


SCRIPT = """
import os, sys
from cloudvmm.cli.main import main
status = main(["--engine=fake", "--api-socket=/dev/null/no-folder"])
files = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]
with open(sys.argv[1], "w") as report:
    print(status, *files, file=report)
"""


@pytest.mark.parametrize(("closed", "count"), [("<&-", 1), (">&-", 1), ("2>&-", 1), ("<&- >&- 2>&-", 3)])
def test_closed_standard_files_are_filled(closed, count, tmp_path):
    report = tmp_path / "report"
    shell = ["sh", "-c", f'exec "$0" -c "$@" {closed}', sys.executable, SCRIPT, str(report)]
    subprocess.run(shell, check=True, timeout=LONG_S, capture_output=True, input=b"")
    status, *files = report.read_text().split()

    assert status == "1"
    assert files.count("/dev/null") == count
