"""What tells a file from others that come to its path later."""

from __future__ import annotations

import os


def inode_of(path: str) -> tuple[int, int] | None:
    """Return device and number of the file at `path`, links not followed; None where there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
