"""What every vhost-user device has: the connection over which QEMU and a back end talk.

We connect ourselves and hand QEMU the descriptor. So a socket that cannot be connected to is refused in the
system's words; and a back end that does not talk, or lacks queues, is found out before QEMU waits for it,
which stops the whole guest. QEMU gets the very connection on which we asked, and asks once more.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import stat
import struct
from collections.abc import Iterator
from typing import Final

from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import DeviceError, DriverKind
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.companion import ServedBacking
from cloudvmm.engine.qemu.memory import rams_of
from cloudvmm.engine.qemu.name import part_id
from cloudvmm.engine.qemu.parts import Properties
from cloudvmm.engine.qemu.vhost_user_relay import Relay
from cloudvmm.vhost.message import HEADER, IS_REPLY, VERSION, Kind, receive

CONNECT_S: Final = 2.0
ANSWER_S: Final = 5.0
_RETRY_S: Final = 0.05
_HAS_PROTOCOL_FEATURES: Final = 1 << 30
_HAS_QUEUE_NUM: Final = 1 << 0
_HAS_CONFIG: Final = 1 << 9
_NUMBER: Final = struct.Struct("=Q")
_PLACE: Final = struct.Struct("=III")  # of a part of the configuration: offset, bytes, flags


class MemoryNotShared(DeviceError):
    """A vhost-user device needs shared memory: the VM's is mergeable, or a file that is not shared"""


class VhostUserConnectError(DeviceError):
    """Connection to socket failed"""


class VhostUserFeaturesError(DeviceError):
    """Get features failed"""


class VhostUserProtocolFeaturesError(DeviceError):
    """Get protocol features failed"""


class VhostUserQueueNumError(DeviceError):
    """Get queue max number failed"""


class VhostUserConfigError(DeviceError):
    """Failed getting the configuration"""


class BadQueueNum(DeviceError):
    """Queue number  is not correct"""


class TooFewQueues(DeviceError):
    def __init__(self, wanted: int, most: int) -> None:
        super().__init__(f"The back end has {most} queues, and {wanted} are needed")


class NoVhostUserAnswer(DeviceError):
    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"The back end did not answer within {timeout_s:g} s")


class VhostUserClosed(DeviceError):
    """The back end closed the connection"""


class NotVhostUser(DeviceError):
    """The back end does not speak vhost-user"""


class VhostUserBacking(ServedBacking, kw_only=True):
    """Either the `path` of a socket at which the user's back end serves, or our end `fd` of a connection.

    Where there is a path, QEMU connects. `config` is what was asked for of the configuration of the device,
    where the back end has one.
    """

    path: str | None = None
    config: bytes = b""

    @property
    def maps_memory(self) -> bool:
        return True

    def check_in(self, vm_config: VmConfig) -> None:
        """:raises MemoryNotShared: the back end would not see what the guest writes."""
        if not all(ram.is_shared for ram in rams_of(vm_config.memory)):
            raise MemoryNotShared


class RelayedBacking(VhostUserBacking, kw_only=True):
    """`path` is that of `relay`, which has the connection to the back end: of a disk or a network device."""

    relay: Relay

    @property
    def driver_kind(self) -> DriverKind:
        return DriverKind.VHOST_USER

    def close(self) -> None:
        self.relay.close()


def open_vhost_user(
    device_id: str | None,
    path: str,
    *,
    queues: int,
    config_bytes: int = 0,
    attempt: Attempt | None = None,
) -> VhostUserBacking:
    """Blocking. Connect to the back end that serves at the socket `path`. The caller owns the result.

    One that is about to serve is awaited for a moment: some end with a connection and are started again.

    :raises VhostUserConnectError: there is none; the cause tells why.
    :raises DeviceError: it does not talk as one should, or has fewer than `queues`.
    :raises MachineGone: `attempt` was aborted.
    """
    device_id = id_of(device_id)
    connection, config = open_connection(
        path, queues=queues, attempt=attempt or Attempt(), config_bytes=config_bytes
    )
    return VhostUserBacking(device_id=device_id, fd=connection.detach(), config=config)


def open_connection(
    path: str, *, queues: int, attempt: Attempt, config_bytes: int = 0, timeout_s: float | None = None
) -> tuple[socket.socket, bytes]:
    """Blocking. Connect to the back end at `path`, within `timeout_s` or `CONNECT_S`, and have it talk.

    Return the connection, which the caller owns, and what `check_back_end` returns.

    :raises DeviceError: as `connect` and `check_back_end`. :raises MachineGone: `attempt` was aborted.
    """
    connection = connect(path, timeout_s=CONNECT_S if timeout_s is None else timeout_s, attempt=attempt)
    try:
        with attempt.waiting(connection):
            return connection, check_back_end(connection, queues=queues, config_bytes=config_bytes)
    except BaseException:
        connection.close()
        raise


def vhost_user_chardev(backing: VhostUserBacking, *, reconnect: Properties | None = None) -> Properties:
    """Describe the character device of `backing`; `reconnect` says how often QEMU tries to have it again.

    With it, QEMU stands still until there is a first connection.
    """
    if backing.path is None:
        address: Properties = {"type": "fd", "data": {"str": str(backing.fd)}}
    else:
        address = {"type": "unix", "data": {"path": os.path.abspath(backing.path)}}
    data: Properties = {"addr": address, "server": False}
    return {
        "id": part_id(backing.device_id, "chr"),
        "backend": {"type": "socket", "data": data | (reconnect or {})},
    }


def connect(path: str, *, timeout_s: float, attempt: Attempt) -> socket.socket:
    """Blocking. Connect to the UNIX socket `path`, which may be there in a moment only. The caller owns it.

    It is tried as often as fits into `timeout_s`: a host that stands still takes none of the tries.

    :raises VhostUserConnectError: nobody listens there, or it is none; the cause tells why.
    :raises MachineGone: `attempt` was aborted.
    """
    if "\0" in path:  # as the first character it would be no file at all
        raise VhostUserConnectError from ValueError("The path holds a NUL character")
    tries = math.ceil(timeout_s / _RETRY_S)
    while True:
        tries -= 1
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            may_come = isinstance(error, FileNotFoundError | ConnectionRefusedError | BlockingIOError)
            if not may_come or _is_no_socket(path) or tries < 0:
                if error.errno is not None:  # else its text alone tells what it is
                    error.filename = path
                raise VhostUserConnectError from error
        attempt.pause(_RETRY_S)


def _is_no_socket(path: str) -> bool:
    try:
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def check_back_end(
    connection: socket.socket, *, queues: int, config_bytes: int = 0, timeout_s: float | None = None
) -> bytes:
    """Blocking. Have the back end show that it can talk and has `queues`.

    Return the first `config_bytes` of its configuration, nothing where it has none. Each answer may take
    `timeout_s`, or `ANSWER_S`.

    :raises DeviceError: it cannot, or has not; the cause tells why.
    """
    connection.settimeout(ANSWER_S if timeout_s is None else timeout_s)
    features = _ask_number(connection, Kind.GET_FEATURES, VhostUserFeaturesError)
    if not features & _HAS_PROTOCOL_FEATURES:
        return b""
    protocol = _ask_number(connection, Kind.GET_PROTOCOL_FEATURES, VhostUserProtocolFeaturesError)
    # What is not agreed on may not be asked for. QEMU agrees anew.
    agreed = protocol & (_HAS_QUEUE_NUM | (_HAS_CONFIG if config_bytes else 0))
    with _failing_as(VhostUserProtocolFeaturesError, connection):
        _send(connection, Kind.SET_PROTOCOL_FEATURES, _NUMBER.pack(agreed))
    if agreed & _HAS_QUEUE_NUM:
        most = _ask_number(connection, Kind.GET_QUEUE_NUM, VhostUserQueueNumError)
        if queues > most:
            raise BadQueueNum from TooFewQueues(queues, most)
    if not agreed & _HAS_CONFIG:
        return b""
    with _failing_as(VhostUserConfigError, connection):
        wanted = _PLACE.pack(0, config_bytes, 0) + bytes(config_bytes)
        _send(connection, Kind.GET_CONFIG, wanted)
        return _answer(connection, Kind.GET_CONFIG, len(wanted))[_PLACE.size :]


def _ask_number(connection: socket.socket, request: int, error: type[DeviceError]) -> int:
    """:raises DeviceError: an `error`, where there is no proper answer."""
    with _failing_as(error, connection):
        _send(connection, request, b"")
        (number,) = _NUMBER.unpack(_answer(connection, request, _NUMBER.size))
    return int(number)


@contextlib.contextmanager
def _failing_as(error: type[DeviceError], connection: socket.socket) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise error from NoVhostUserAnswer(connection.gettimeout() or 0)
    except ConnectionError:
        raise error from VhostUserClosed()
    except NotVhostUser as reason:
        raise error from reason


def _send(connection: socket.socket, request: int, body: bytes) -> None:
    connection.sendall(HEADER.pack(request, VERSION, len(body)) + body)


def _answer(connection: socket.socket, wanted: int, size: int) -> bytes:
    """Return the `size` bytes that the back end answers to the request `wanted`.

    :raises NotVhostUser: it sends anything else. :raises OSError: it sends nothing.
    """
    request, flags, found = HEADER.unpack(receive(connection, HEADER.size))
    if request != wanted or not flags & IS_REPLY or found != size:
        raise NotVhostUser
    return receive(connection, size)
