"""The vsock device: vhost-user, served by a back end that ends on a UNIX socket of the host.

The back end is `vhost-device-vsock` where that is installed, else `cloudvmm.vsock`. Both are programs of
their own that die with us. The socket belongs to the device: where there is something at its path the device
is refused, and the file goes with the device.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from contextlib import ExitStack
from typing import Final

from cloudvmm.config.device import VsockConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.claim import claim_path, end_claim
from cloudvmm.engine.qemu.companion import Companion, NoProgram, find_program
from cloudvmm.engine.qemu.confinement import confine_program
from cloudvmm.engine.qemu.name import qdev_id
from cloudvmm.engine.qemu.parts import Parts
from cloudvmm.engine.qemu.seat import Seat
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking, vhost_user_chardev
from cloudvmm.host.inode import inode_of
from cloudvmm.host.program import own_files
from cloudvmm.host.scratch import ScratchFolder

_READY_S: Final = 10.0
_END_S: Final = 1.0
_LOOK_S: Final = 0.005
_PROGRAM: Final = "vhost-device-vsock"


class VsockBackendError(DeviceError):
    """Cannot create virtio-vsock backend"""


class VsockBindError(DeviceError):
    """Error binding to the host-side Unix socket"""


class VsockBackendSilent(DeviceError):
    """The vsock back end did not begin to serve"""


class VsockBacking(VhostUserBacking, kw_only=True):
    """`socket_path` is that of the host's programs; `socket_inode` tells whether it is still ours.

    Without an inode it is, whatever is there: the back end may bind it anew. `claim` is `claim_path`'s.
    """

    socket_path: str | None = None
    socket_inode: tuple[int, int] | None = None
    claim: str | None = None

    def close(self) -> None:
        super().close()
        path, self.socket_path = self.socket_path, None
        if path is not None and self.socket_inode in (None, inode_of(path)):
            with contextlib.suppress(OSError):
                os.unlink(path)
        claim, self.claim = self.claim, None
        end_claim(claim)


def open_vsock(vsock: VsockConfig, attempt: Attempt) -> VsockBacking:
    """Blocking. Listen at the socket of `vsock` and start a back end. The caller owns the result.

    :raises DeviceError: the socket cannot be had, or no back end can.
    :raises MachineGone: `attempt` was aborted.
    """
    vsock_id = id_of(vsock.id)
    path = os.path.abspath(vsock.socket)
    try:
        backing = VsockBacking(device_id=vsock_id)
        with ExitStack() as undo:
            undo.callback(backing.close)
            backing.claim = claim_path(attempt.state_dir, path)
            with _listen(path) as listener:
                backing.socket_path, backing.socket_inode = path, inode_of(path)
                if (program := _installed_program()) is None:
                    _serve(vsock.cid, listener, backing, attempt)
            if program is not None:
                _serve_by(program, vsock.cid, backing, attempt)
            undo.pop_all()
        return backing
    except DeviceError as error:
        raise VsockBackendError from error


def vsock_parts(_vsock: VsockConfig, backing: VsockBacking, seat: Seat) -> Parts:
    """Describe the device on `backing`, which knows the guest's CID."""
    chardev = vhost_user_chardev(backing)
    device = {
        "driver": "vhost-user-vsock-pci",
        "id": qdev_id(backing.device_id),
        **seat.place(backing.device_id),
        "chardev": chardev["id"],
    }
    return Parts(chardevs=[chardev], devices=[device])


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen(socket.SOMAXCONN)
    except (OSError, ValueError) as error:
        listener.close()
        raise VsockBindError from error
    return listener


def _installed_program() -> str | None:
    try:
        return find_program(_PROGRAM, package=_PROGRAM)
    except NoProgram:
        return None


def _serve_by(program: str, cid: int, backing: VsockBacking, attempt: Attempt) -> None:
    """Start `program`, which listens by itself at both of its paths; that of vhost-user is taken away again.

    It replaces what is at the path for the host's programs, also later, when QEMU has left: that is why a
    socket of ours is there first.
    """
    with ScratchFolder() as folder:
        backing.socket_inode = None
        sockets = ["--socket", folder.socket_path, "--uds-path", str(backing.socket_path)]
        argv = [program, "--guest-cid", str(cid), *sockets]
        backing.companion = Companion(argv, name=_PROGRAM, attempt=attempt)
        backing.fd = _connect(folder.socket_path, backing.companion, attempt)


def _connect(path: str, companion: Companion, attempt: Attempt) -> int:
    """Return a connection to `path`, at which `companion` is about to listen.

    :raises DeviceError: it ended, or does not listen. :raises MachineGone: `attempt` was aborted.
    """
    deadline = time.monotonic() + _READY_S
    with socket.socket(socket.AF_UNIX) as near:
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                near.connect(path)
                return near.detach()
            companion.check(timeout_s=_LOOK_S)
            attempt.check()
            if time.monotonic() > deadline:
                raise VsockBackendSilent


def _serve(cid: int, listener: socket.socket, backing: VsockBacking, attempt: Attempt) -> None:
    """Start our own back end on `listener`, whose other descriptors here may be closed then."""
    near, far = socket.socketpair()
    ready, write_ready = os.pipe()
    with far, ExitStack() as undo:
        undo.callback(os.close, ready)
        backing.fd = near.detach()
        fds = [far.fileno(), listener.fileno(), write_ready]
        try:
            program = [sys.executable, "-P", "-m", "cloudvmm.vsock"]
            argv = [*program, str(cid), str(backing.socket_path), *map(str, fds)]
            backing.companion = Companion(
                argv,
                name="The vsock back end",
                attempt=attempt,
                fds=fds,
                confinement=confine_program(attempt.policy, sys.executable, readable=own_files()),
            )
        finally:
            os.close(write_ready)
        with attempt.waiting(backing.companion):
            _wait_ready(ready, backing.companion)


def _wait_ready(ready: int, companion: Companion) -> None:
    """:raises DeviceError: it ended, or says nothing."""
    poller = select.poll()
    poller.register(ready, select.POLLIN)
    poller.register(companion, select.POLLIN)
    told = dict(poller.poll(_READY_S * 1000))
    if not told:
        raise VsockBackendSilent
    if ready not in told or not os.read(ready, 1):
        companion.check(timeout_s=_END_S)
        raise VsockBackendSilent
