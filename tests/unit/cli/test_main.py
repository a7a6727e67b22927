"""What the command puts right of what it was started with."""

from __future__ import annotations

import signal


def test_ignored_sigchld_is_not_kept():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        from cloudvmm.cli.main import main

        assert main(["--version"]) == 0
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)
