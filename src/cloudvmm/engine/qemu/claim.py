"""Paths of the host at which a device is about to have a socket: written before it is made.

So whoever goes on where a manager was killed in the middle of that finds the socket, which is nobody's, and
removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection
from typing import Final

from cloudvmm.host.dead_socket import remove_dead

_NAME: Final = re.compile(r"socket-\d+\.path", re.ASCII)


def claim_path(state_dir: str | None, path: str) -> str | None:
    """Write that a socket is about to be made at `path`, for as long as the file lies there that is returned.

    None where there is something at the path: it is not ours, and will not be; or no folder.

    :raises OSError: it cannot be written.
    """
    if state_dir is None or os.path.lexists(path):
        return None
    claim = f"{state_dir}/socket-{time.monotonic_ns()}.path"
    with open(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(os.fsencode(path))
    return claim


def end_claim(claim: str | None) -> None:
    """The socket is gone, or was never made."""
    if claim is not None:
        with contextlib.suppress(OSError):
            os.unlink(claim)


def sweep_claims(state_dir: str, *, kept: Collection[str] = ()) -> None:
    """Blocking, briefly. Remove the sockets that nobody serves, and all claims that are not among `kept`."""
    for name in filter(_NAME.fullmatch, os.listdir(state_dir)):
        claim = f"{state_dir}/{name}"
        if claim not in kept:
            with contextlib.suppress(OSError), open(claim, "rb") as file:
                remove_dead(file.read())
            end_claim(claim)
