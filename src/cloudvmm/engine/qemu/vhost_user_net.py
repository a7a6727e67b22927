"""Network devices that a vhost-user back end of the user's serves.

We connect, or wait for the back end to do so, and make sure that it speaks before QEMU talks to it: QEMU
would wait for its words for ever, and answer nobody meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from typing import Final

from cloudvmm.config.net import NetConfig, VhostMode
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.vhost_user import VhostUserBacking, VhostUserConnectError
from cloudvmm.engine.qemu.vhost_user_relay import HEADER, Relay, receive

_DEADLINE_S: Final = 10.0
_RETRY_S: Final = 0.05
_LEAST_S: Final = 1.0  # for an answer, even where connecting took all the time
_GET_FEATURES: Final = 1
_FEATURES_BYTES: Final = 8
_VERSION: Final = 1
_REPLY: Final = 4


class VhostUserListenError(VhostUserConnectError):
    """Cannot listen for the vhost-user back end"""


class VhostUserNoBackend(VhostUserConnectError):
    def __init__(self, path: str) -> None:
        super().__init__(f"No vhost-user back end connected to {path} within {_DEADLINE_S:g} s")


class VhostUserSilent(VhostUserConnectError):
    def __init__(self, path: str) -> None:
        super().__init__(f"What serves at {path} does not speak vhost-user")


class VhostUserNetBacking(VhostUserBacking, kw_only=True):
    """`path` is that of `relay`, which has the connection to the back end."""

    relay: Relay

    def close(self) -> None:
        self.relay.close()


def open_vhost_user_net(net: NetConfig) -> VhostUserNetBacking:
    """Blocking: waits for the back end, 10 s at most. The caller owns the result.

    :raises VhostUserConnectError: there is none, or it does not speak; the cause tells why.
    """
    device_id = id_of(net.id)
    path = net.vhost_socket or ""
    deadline = time.monotonic() + _DEADLINE_S
    connection = _accept(path, deadline) if net.vhost_mode is VhostMode.SERVER else _connect(path, deadline)
    try:
        _check_speaks(connection, path, deadline)
        relay = Relay(connection)
    except BaseException:
        connection.close()
        raise
    return VhostUserNetBacking(device_id=device_id, path=relay.path, relay=relay)


def _connect(path: str, deadline: float) -> socket.socket:
    """Connect to a back end, which may be about to start."""
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(max(deadline - time.monotonic(), _RETRY_S))
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            if time.monotonic() > deadline or _is_no_socket(path):
                raise VhostUserConnectError from OSError(error.errno, error.strerror, path)
            time.sleep(_RETRY_S)
        except (OSError, ValueError) as error:  # a directory, too long a path, a NUL in it
            connection.close()
            raise VhostUserConnectError from error
        else:
            return connection


def _is_no_socket(path: str) -> bool:
    try:
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _accept(path: str, deadline: float) -> socket.socket:
    """Listen at `path` until a back end connects; the socket file is gone afterwards."""
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(path)
        except (OSError, ValueError) as error:
            raise VhostUserListenError from error
        try:
            listener.listen(1)
            listener.settimeout(max(deadline - time.monotonic(), _RETRY_S))
            connection, _ = listener.accept()
        except TimeoutError as error:
            raise VhostUserNoBackend(path) from error
        except OSError as error:
            raise VhostUserListenError from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
    return connection


def _check_speaks(connection: socket.socket, path: str, deadline: float) -> None:
    """Ask for the features, which QEMU will do again, and does no harm."""
    connection.settimeout(max(deadline - time.monotonic(), _LEAST_S))
    try:
        connection.sendall(HEADER.pack(_GET_FEATURES, _VERSION, 0))
        answer = HEADER.unpack(receive(connection, HEADER.size))
        if answer != (_GET_FEATURES, _VERSION | _REPLY, _FEATURES_BYTES):
            raise VhostUserSilent(path)
        receive(connection, _FEATURES_BYTES)
    except OSError as error:
        raise VhostUserSilent(path) from error
    connection.settimeout(None)
