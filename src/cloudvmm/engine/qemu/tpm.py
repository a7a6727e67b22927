"""A TPM 2.0 that swtpm plays: the user's, at the socket of its control channel, or one that we start.

QEMU gets the connection when swtpm has answered on it: a QEMU that is told to connect by itself waits without
end for one that serves another guest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from typing import Final

from cloudvmm.config.device import TpmConfig
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import Backing
from cloudvmm.engine.qemu.companion import Companion, ServedBacking, find_program
from cloudvmm.engine.qemu.confinement import confine_program
from cloudvmm.engine.qemu.name import part_id, qdev_id
from cloudvmm.engine.qemu.parts import Parts

TPM_ID: Final = "__tpm"

_ANSWER_S: Final = 5.0
_RETRY_S: Final = 0.05
_GET_CAPABILITY: Final = struct.pack(">I", 1)
_CAPABILITIES: Final = struct.Struct(">Q")
# To be initialised, shut down, stopped, told its locality, its buffer's size and its data descriptor.
_NEEDED: Final = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 7 | 1 << 10 | 1 << 12 | 1 << 13


class TpmError(DeviceError):
    """Cannot create tmp device"""  # the reference's words, slip included


class TpmConnectError(DeviceError):
    """The control channel of swtpm cannot be connected to"""


class TpmSilent(DeviceError):
    """Nobody answers on the control channel: is it swtpm's, and does it serve another guest?"""


class TpmTooSimple(DeviceError):
    """Required capabilities not supported by tpm backend"""


class TpmStateError(DeviceError):
    """The folder for the state of the TPM cannot be opened"""


class TpmStateInUse(DeviceError):
    """Another TPM has its state in this folder"""


class TpmNeedsQboot(DeviceError):
    """A guest that SeaBIOS starts finds no TPM: it needs qboot.rom, and no VM generation id"""


class TpmBacking(ServedBacking, kw_only=True):
    """`fd` is our end of the control channel, `companion` the swtpm where it is ours."""


def open_tpm(tpm: TpmConfig, attempt: Attempt) -> TpmBacking:
    """Blocking. Connect to a swtpm, or start one, and wait until it answers. The caller owns the result.

    :raises TpmError: there is none; the cause tells why. :raises MachineGone: `attempt` was aborted.
    """
    try:
        if tpm.state_dir is None:
            return _connected(tpm.socket or "", attempt)
        return _started(tpm.state_dir, attempt)
    except DeviceError as error:
        raise TpmError from error


def tpm_parts(backing: Backing | None) -> Parts:
    """Describe the TPM: the interface that Linux and Windows know as CRB, at its place in memory."""
    if not isinstance(backing, TpmBacking):
        return Parts()
    channel, emulator = part_id(TPM_ID, "chr"), part_id(TPM_ID, "emu")
    address = {"type": "fd", "data": {"str": str(backing.fd)}}
    chardev = {"id": channel, "backend": {"type": "socket", "data": {"addr": address, "server": False}}}
    return Parts(
        chardevs=[chardev],
        tpmdevs=[{"id": emulator, "type": "emulator", "chardev": channel}],
        devices=[{"driver": "tpm-crb", "id": qdev_id(TPM_ID), "tpmdev": emulator}],
    )


def _connected(path: str, attempt: Attempt) -> TpmBacking:
    with contextlib.ExitStack() as undo:
        channel = undo.enter_context(socket.socket(socket.AF_UNIX))
        try:
            _connect(channel, path, attempt)
        except (OSError, ValueError) as error:  # too long, or with a NUL character
            raise TpmConnectError from error
        with attempt.waiting(channel):
            _check_capabilities(channel)
        undo.pop_all()
    return TpmBacking(device_id=TPM_ID, fd=channel.detach())


def _connect(channel: socket.socket, path: str, attempt: Attempt) -> None:
    """Connect, as soon as whoever listens has room for one more."""
    deadline = time.monotonic() + _ANSWER_S
    channel.setblocking(False)
    while True:
        try:
            return channel.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError("timed out") from None
        attempt.pause(_RETRY_S)


def _started(folder: str, attempt: Attempt) -> TpmBacking:
    """Start a swtpm that has its end of the channel and the folder as descriptors: no name can go wrong."""
    program = find_program("swtpm", package="swtpm")
    with contextlib.ExitStack() as undo:
        try:
            state_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise TpmStateError from error
        undo.callback(os.close, state_fd)
        _check_unused(state_fd)
        near, far = socket.socketpair()
        with contextlib.ExitStack() as failed, far:
            failed.enter_context(near)
            companion = Companion(
                [
                    *(program, "socket", "--tpm2", "--tpmstate", f"dir=/proc/self/fd/{state_fd}"),
                    *("--ctrl", f"type=unixio,clientfd={far.fileno()}"),
                ],
                name="swtpm",
                attempt=attempt,
                fds=[state_fd, far.fileno()],
                confinement=confine_program(attempt.policy, program),
            )
            failed.callback(companion.close)
            far.close()
            with attempt.waiting(near, companion):
                try:
                    _check_capabilities(near)
                except TpmSilent:
                    companion.check()
                    raise
            failed.pop_all()
    return TpmBacking(device_id=TPM_ID, fd=near.detach(), companion=companion)


def _check_unused(state_fd: int) -> None:
    """Look whether another swtpm has locked the state: ours would say so to QEMU, as a number.

    :raises TpmStateInUse: one has.
    """
    try:
        lock_fd = os.open(".lock", os.O_RDWR | os.O_CLOEXEC, dir_fd=state_fd)
    except OSError:
        return  # there was none here yet, or ours will tell
    try:
        fcntl.lockf(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise TpmStateInUse from None
    finally:
        os.close(lock_fd)


def _check_capabilities(channel: socket.socket) -> None:
    """Ask what swtpm can do, which changes nothing in it, and leave the channel blocking.

    :raises DeviceError: no answer, or not the one that QEMU needs.
    """
    deadline = time.monotonic() + _ANSWER_S
    answer = b""
    try:
        channel.settimeout(_ANSWER_S)
        channel.sendall(_GET_CAPABILITY)
        while len(answer) < _CAPABILITIES.size:
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            piece = channel.recv(_CAPABILITIES.size - len(answer))
            if not piece:
                raise ConnectionResetError
            answer += piece
    except OSError as error:
        raise TpmSilent from error
    (capabilities,) = _CAPABILITIES.unpack(answer)
    if capabilities & _NEEDED != _NEEDED:
        raise TpmTooSimple
    channel.settimeout(None)
