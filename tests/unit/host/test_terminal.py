"""Pseudo-terminals and who closes them."""

from __future__ import annotations

import os

from cloudvmm.host.terminal import open_pty


def test_pty_is_closed_once_whoever_got_its_numbers_since():
    pty = open_pty()
    pty.close()
    taken = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
    pty.close()

    for fd in taken:
        os.close(fd)  # would fail if the second close had hit it
