"""Run a program of Debian's and say plainly what stopped it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cloudvmm.guest.error import ToolFailed, ToolMissing

# mke2fs and its like live where the PATH of an ordinary user does not look.
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run_tool(
    argv: Sequence[str],
    *,
    package: str,
    stdin: bytes | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600,
) -> bytes:
    """Run `argv` to its end and return what it printed. Blocks, `timeout_s` at most.

    :raises ToolMissing: when there is no such program; `package` is named.
    :raises ToolFailed: when it ends with a status other than 0 or does not end in time.
    """
    path = f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"
    env = {**os.environ, "LC_ALL": "C", "PATH": path, **(environment or {})}
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, cwd=folder, env=env, timeout=timeout_s, check=False
        )
    except FileNotFoundError as error:
        raise ToolMissing(argv[0], package) from error
    except subprocess.TimeoutExpired as error:
        raise ToolFailed(argv[0], -1, f"no end after {timeout_s:g} s") from error
    if done.returncode != 0:
        raise ToolFailed(argv[0], done.returncode, done.stderr.decode(errors="replace")[-2000:])
    return done.stdout
