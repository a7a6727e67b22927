"""The folder for all that we keep between runs and can do without."""

from __future__ import annotations

import os


def cache_folder() -> str | None:
    """Return its absolute path, which need not exist; None where the environment names none.

    It is ``$CLOUDVMM_CACHE``, else ``$XDG_CACHE_HOME/cloudvmm``, else ``~/.cache/cloudvmm``.
    """
    if folder := os.environ.get("CLOUDVMM_CACHE"):
        return os.path.abspath(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return os.path.abspath(f"{folder}/cloudvmm")
    home = os.path.expanduser("~")
    return None if home == "~" else os.path.abspath(f"{home}/.cache/cloudvmm")


def make_cache_folder(folder: str) -> None:
    """Make `folder`, for its owner's eyes only, unless it is there.

    :raises OSError: it cannot be made.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
