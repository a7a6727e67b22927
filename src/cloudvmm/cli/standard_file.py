"""Standard input, output and error of a program that may have been started without them."""

from __future__ import annotations

import os
import sys


def open_standard_files() -> None:
    """Fill standard input, output and error where they are closed.

    Else the next file opened would take their place, be it a socket or a disk, and get what is printed.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
