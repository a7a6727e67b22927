"""Where the program that runs here lies: Python, its modules, and ours; and where others do."""

from __future__ import annotations

import errno
import os
import sys
from typing import Final

_SCRIPT: Final = b"#!"
_PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def own_files() -> list[str]:
    """Return the folders beneath which whatever may yet be imported is."""
    return [sys.prefix, sys.base_prefix, os.path.dirname(_PACKAGE), *(path for path in sys.path if path)]


def locate(name: str) -> str:
    """Return the path of a program of the host.

    :raises FileNotFoundError: it is in no folder of PATH.
    """
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        if folder and os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def is_script(program: str) -> bool:
    """Say whether an interpreter runs it: what it needs, or starts in turn, nobody knows."""
    try:
        with open(program, "rb") as file:
            return file.read(len(_SCRIPT)) == _SCRIPT
    except OSError:
        return False
