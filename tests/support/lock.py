"""Whether somebody holds an image."""

from __future__ import annotations

from pathlib import Path

from cloudvmm.host.lock import LockConflict, lock_file


def is_locked(path: Path) -> bool:
    """Say whether a lock of somebody else's keeps us from writing to `path`, as a whole."""
    with path.open("r+b") as file:
        try:
            lock_file(file.fileno(), path=str(path), write=True)
        except LockConflict:
            return True
    return False
