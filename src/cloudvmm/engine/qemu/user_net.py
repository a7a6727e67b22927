"""User-mode networking: passt where a good one is installed and starts, else what QEMU has of its own.

Both give the guest the same addresses: it gets 10.0.2.15 by DHCP, 10.0.2.2 is its gateway and leads to the
loopback interface of the host. Neither needs rights on the host.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import Final

from cloudvmm.config.net import NetConfig
from cloudvmm.config.user_net import Forward, UserNetConfig, parse_forward
from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.companion import Companion, ServedBacking, find_program, version_of
from cloudvmm.engine.qemu.parts import Properties

_GUEST: Final = "10.0.2.15"
_GATEWAY: Final = "10.0.2.2"
_PREFIX_LENGTH: Final = "24"
_START_S: Final = 5.0
# That of Debian 12 repeats and loses bytes of connections that are closed in one direction first.
_OLDEST_PASST: Final = "20240101"
_DATE: Final = re.compile(r"(20\d\d)_?(\d\d)_?(\d\d)", re.ASCII)
_FRAME_LIMIT_BYTES: Final = 1 << 17
_LENGTH: Final = struct.Struct("!I")  # goes before each frame
_ETHERNET_BYTES: Final = 14
_ETHERTYPE: Final = slice(12, 14)
_ARP: Final = b"\x08\x06"
_KINDS: Final = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


class ForwardNotPossible(DeviceError):
    def __init__(self, text: str) -> None:
        super().__init__(f'The port of the forward "{text}" cannot be had on the host')


class PasstTooOld(DeviceError):
    """This passt is too old"""


class UserNetBacking(ServedBacking, kw_only=True):
    """`fd` is QEMU's end of the connection to `companion`, -1 where QEMU does the networking itself."""

    forwards: list[Forward]

    @property
    def needs_network(self) -> bool:
        return self.fd < 0


def open_user_net(net: NetConfig, user: UserNetConfig, attempt: Attempt) -> UserNetBacking:
    """Blocking, some 20 ms where there is passt. The caller owns the result.

    :raises ForwardNotPossible: the port of a forward is taken, or ours to use it is not; the cause tells.
    :raises MachineGone: `attempt` was aborted.
    """
    for text in user.forwards:
        _check_port(text)
    backing = UserNetBacking(
        device_id=id_of(net.id), forwards=[parse_forward(text) for text in user.forwards]
    )
    # It confines itself by mounts. Where it cannot serve, as on a host without a route, QEMU still can.
    if not attempt.policy.is_enclosed:
        with contextlib.suppress(DeviceError):
            _start_passt(backing, net, attempt)
    return backing


def _check_port(text: str) -> None:
    """Take the port and let go of it at once: what serves it says no more than that it failed."""
    forward = parse_forward(text)
    with socket.socket(socket.AF_INET, _KINDS[forward.protocol]) as trial:
        try:
            if forward.protocol == "tcp":
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((forward.address, forward.port))
        except OSError as error:
            raise ForwardNotPossible(text) from error


def _start_passt(backing: UserNetBacking, net: NetConfig, attempt: Attempt) -> None:
    """:raises DeviceError: there is no passt, or it does not serve here."""
    program = find_program("passt", package="passt", folders=["/usr/bin"])
    _check_version(program, attempt)
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as undo:
        undo.enter_context(ours)
        with theirs:
            companion = Companion(
                [program, *_arguments(backing.forwards, net, fd=theirs.fileno())],
                name="passt",
                attempt=attempt,
                fds=[theirs.fileno()],
            )
        undo.callback(companion.close)
        with attempt.waiting(ours, companion):
            _await_answer(ours, companion)
        undo.pop_all()
    backing.fd = ours.detach()
    backing.companion = companion


def _check_version(program: str, attempt: Attempt) -> None:
    """:raises DeviceError: it is older than what can be trusted, or does not tell."""
    date = _DATE.search(version_of(program, name="passt", attempt=attempt))
    if date is None or "".join(date.groups()) < _OLDEST_PASST:
        raise PasstTooOld


def _arguments(forwards: list[Forward], net: NetConfig, *, fd: int) -> Iterator[str]:
    yield from ("--foreground", "--quiet", "--stderr", "--fd", str(fd))
    yield from ("--address", _GUEST, "--netmask", _PREFIX_LENGTH, "--gateway", _GATEWAY)
    if net.mtu is not None:
        yield from ("--mtu", str(net.mtu))
    for forward in forwards:
        option = f"--{forward.protocol}-ports"
        yield from (option, f"{forward.address}/{forward.port}:{forward.guest_port}")


def _await_answer(connection: socket.socket, companion: Companion) -> None:
    """Ask for the gateway's hardware address, as the guest will: who answers serves.

    :raises DeviceError: nobody answered.
    """
    question = _question()
    deadline = time.monotonic() + _START_S
    try:
        connection.sendall(_LENGTH.pack(len(question)) + question)
        while _frame(connection, deadline)[_ETHERTYPE] != _ARP:
            pass
    except OSError as error:
        companion.check()
        raise DeviceError("passt does not serve") from error


def _question() -> bytes:
    sender = bytes.fromhex("2e0000000000")
    addresses = sender + socket.inet_aton(_GUEST) + bytes(6) + socket.inet_aton(_GATEWAY)
    return b"\xff" * 6 + sender + _ARP + struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + addresses


def _frame(connection: socket.socket, deadline: float) -> bytes:
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline))
    if length > _FRAME_LIMIT_BYTES:
        raise OSError(f"passt announces a frame of {length} bytes")
    return _receive(connection, length, deadline)


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([connection], [], [], left)[0]:
            raise TimeoutError
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return data


def user_netdev(backing: UserNetBacking, *, netdev_id: str) -> Properties:
    """Describe the back end of `backing` to QEMU."""
    if backing.fd >= 0:
        address = {"type": "fd", "str": str(backing.fd)}
        return {"type": "stream", "id": netdev_id, "server": False, "addr": address}
    forwards = [
        {"str": f"{each.protocol}:{each.address}:{each.port}-{_GUEST}:{each.guest_port}"}
        for each in backing.forwards
    ]
    return {"type": "user", "id": netdev_id, "hostfwd": forwards}
