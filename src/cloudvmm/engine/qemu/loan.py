"""Files that QEMU opens itself and that its user could not: lent to it by descriptors, none of them changed.

What lies where its user does not get to is opened by us, and opened again by that. What is not its user's is
shown to it as if it were, by a mount that nobody sees. What is left takes a power of root's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from cloudvmm.config.payload import PayloadConfig
from cloudvmm.engine.qemu.parts import opened
from cloudvmm.host.id_map import IdMap
from cloudvmm.host.standard_fd import LAST_STANDARD_FD
from cloudvmm.host.user import Want, refused, want_again

_PAYLOAD: Final = ("kernel", "initramfs", "firmware")


class Loan(msgspec.Struct, kw_only=True):
    """`payload` names files as QEMU is to open them; `names` are what they were, by their new ones.

    QEMU is to inherit `fds`, and in the place of those descriptors that are keys of `shown` their values, all
    of them lent. `wanted` is what is opened and was not lent.
    """

    payload: PayloadConfig | None
    names: dict[str, str] = msgspec.field(default_factory=dict)
    fds: list[int] = msgspec.field(default_factory=list)
    shown: dict[int, int] = msgspec.field(default_factory=dict)
    wanted: list[Want] = msgspec.field(default_factory=list)


def lend_files(
    id_map: IdMap | None,
    payload: PayloadConfig | None,
    *,
    reopened: Sequence[int],
    written: Collection[int],
    undo: contextlib.ExitStack,
) -> Loan:
    """Lend a QEMU whose user is that of `id_map`, us if None, its `payload` and the files open as `reopened`.

    It opens these as they are, but for those of `written`, to which it asks to write. `undo` ends the loan,
    which is for the start of QEMU alone.
    """
    loan = Loan(payload=payload)
    if id_map is None:
        return loan
    for number in reopened:
        _lend_again(id_map, number, is_written=number in written, loan=loan, undo=undo)
    if payload is not None:
        named = {name: getattr(payload, name) for name in _PAYLOAD}
        lent = {name: _lend_file(id_map, path, loan, undo) for name, path in named.items() if path}
        loan.payload = msgspec.structs.replace(payload, **lent)
    return loan


def _lend_again(
    id_map: IdMap, number: int, *, is_written: bool, loan: Loan, undo: contextlib.ExitStack
) -> None:
    try:
        access = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
        want = want_again(number, os.O_RDWR if is_written else access)
        if not refused(id_map.user, [want]):
            return
        loan.wanted.append(want)
        shown = id_map.open(number, access)
        undo.callback(os.close, shown)
        if refused(id_map.user, [want_again(shown, os.O_RDWR if is_written else access)]):
            return
        # The locks that are held by way of the one that it stands for live as long as QEMU.
        held = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, LAST_STANDARD_FD + 1)
        undo.callback(os.close, held)
    except OSError:
        return
    loan.fds.append(held)
    loan.shown[number] = shown
    loan.wanted.remove(want)


def _lend_file(id_map: IdMap, path: str, loan: Loan, undo: contextlib.ExitStack) -> str:
    """Return the name by which the user can open what is at `path`; `path` itself where it can, or cannot."""
    want = Want(os.path.abspath(path), os.R_OK)
    if not refused(id_map.user, [want]):
        return path
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        undo.callback(os.close, fd)
        if refused(id_map.user, [want_again(fd, os.O_RDONLY)]):
            fd = id_map.open(fd, os.O_RDONLY)
            undo.callback(os.close, fd)
            if refused(id_map.user, [want_again(fd, os.O_RDONLY)]):
                raise PermissionError(path)
    except OSError:
        loan.wanted.append(want)
        return path
    loan.fds.append(fd)
    loan.names[opened(fd)] = path
    return opened(fd)
