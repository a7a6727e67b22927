"""virtiofsd, started by us to serve one folder to one guest.

There are two: one in Rust, the package virtiofsd of today, and one in C, which came with QEMU until 7.2. They
differ in their options, and the one in C cannot work for anybody but root.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from typing import Final

from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.companion import Companion, connected_pair, find_program, version_of
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking, VhostUserFeaturesError, check_back_end

NAME: Final = "virtiofsd"
_PACKAGE: Final = "virtiofsd, or qemu-system-common of QEMU 7.2 on Debian 12"
_FOLDERS: Final = ("/usr/libexec", "/usr/lib/qemu")
_C_WORDS: Final = "virtiofsd version "
_START_S: Final = 10.0
_END_S: Final = 1.0
_MOST_FILES: Final = 1_000_000  # what either asks for unless told
_MOUNTS: Final = "/proc/self/mountinfo"
_CAP_SYS_CHROOT: Final = 1 << 18
_CAP_SYS_ADMIN: Final = 1 << 21


class SharedDirError(DeviceError):
    """The shared folder could not be opened"""


class VirtiofsdForRoot(DeviceError):
    def __init__(self, program: str) -> None:
        super().__init__(f"{program} works for root alone: install the package virtiofsd")


def share(device_id: str | None, folder: str, *, queues: int, attempt: Attempt) -> VhostUserBacking:
    """Blocking. Start a virtiofsd that serves `folder`, and wait until it does. The caller owns the result.

    :raises SharedDirError: `folder` is none; the cause tells why.
    :raises DeviceError: there is no virtiofsd, it did not start, in its own words, or lacks `queues`.
    :raises MachineGone: `attempt` was aborted.
    """
    device_id = id_of(device_id)
    _check_folder(folder)
    program = find_program(NAME, package=_PACKAGE, folders=_FOLDERS)
    with contextlib.ExitStack() as undo:
        listener, near = connected_pair()
        connection = undo.enter_context(socket.socket(fileno=near))
        try:
            argv = _arguments(program, os.path.abspath(folder), listener, attempt)
            companion = Companion(argv, name=NAME, attempt=attempt, fds=[listener])
        finally:
            os.close(listener)  # only the child listens from now on: where it ends, so does the connection
        undo.callback(companion.close)
        with attempt.waiting(connection, companion):
            try:
                check_back_end(connection, queues=queues, timeout_s=_START_S)
            except VhostUserFeaturesError:
                companion.check(timeout_s=_END_S)
                raise
        undo.pop_all()
    return VhostUserBacking(device_id=device_id, fd=connection.detach(), companion=companion)


def _check_folder(folder: str) -> None:
    try:
        os.close(os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except (OSError, ValueError) as error:
        raise SharedDirError from error


def _arguments(program: str, folder: str, listener: int, attempt: Attempt) -> list[str]:
    """Return what starts `program` for `folder`; it takes its one connection from `listener`."""
    # The daemon's own wish may be above what it is allowed, and then it ends.
    most_files = min(_MOST_FILES, _hard_limit_of_files())
    sandbox = _sandbox(may_mount=not attempt.policy.is_enclosed)
    # Who is enclosed makes no namespace; the folder is one of the few that it reaches anyway.
    fallback = "none" if attempt.policy.is_enclosed else "namespace"
    shared = [program, f"--fd={listener}", f"--rlimit-nofile={most_files}"]
    if not version_of(program, name=NAME, attempt=attempt).startswith(_C_WORDS):
        return [*shared, "--shared-dir", folder, "--sandbox", sandbox or fallback]
    if sandbox is None:
        raise VirtiofsdForRoot(program)
    return [*shared, "-f", "-o", f"source={_escape(folder)},sandbox={sandbox}"]


def _sandbox(*, may_mount: bool) -> str | None:
    """Return how a daemon is kept in its folder with the rights that we have, None where we have none.

    Without any it makes itself a user namespace, if it is the one in Rust and may.
    """
    rights = _rights()
    if may_mount and rights & _CAP_SYS_ADMIN and _is_root_mounted():
        return "namespace"
    return "chroot" if rights & _CAP_SYS_CHROOT else None


def _is_root_mounted() -> bool:
    """Say whether our root is one of a mount: in a plain folder, where chroot leads, no namespace is made."""
    with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
        return any(line.split(" ")[4] == "/" for line in file)


def _rights() -> int:
    """Return our effective capabilities."""
    with open("/proc/self/status", encoding="utf-8") as file:
        (line,) = (line for line in file if line.startswith("CapEff:"))
    return int(line.split()[1], 16)


def _hard_limit_of_files() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_FILES if hard == resource.RLIM_INFINITY else hard


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace(",", "\\,")
