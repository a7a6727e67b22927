"""Network devices that a vhost-user back end of the user's serves.

We connect, or wait for the back end to do so, and make sure that it speaks before QEMU talks to it: QEMU
would wait for its words for ever, and answer nobody meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import Final

from cloudvmm.config.net import NetConfig, VhostMode
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.backing import id_of
from cloudvmm.engine.qemu.vhost_user import (
    RelayedBacking,
    VhostUserConnectError,
    check_back_end,
    open_connection,
)
from cloudvmm.engine.qemu.vhost_user_relay import Relay

_BACK_END_S: Final = 10.0


class VhostUserListenError(VhostUserConnectError):
    """Cannot listen for the vhost-user back end"""


class VhostUserNoBackend(VhostUserConnectError):
    def __init__(self, path: str) -> None:
        super().__init__(f"No vhost-user back end connected to {path} within {_BACK_END_S:g} s")


def open_vhost_user_net(net: NetConfig, attempt: Attempt) -> RelayedBacking:
    """Blocking: waits for the back end, 10 s at most. The caller owns the result.

    :raises DeviceError: there is none, it does not speak or lacks queues; the cause tells why.
    :raises MachineGone: `attempt` was aborted.
    """
    device_id = id_of(net.id)
    path = net.vhost_socket or ""
    queue_pairs = net.num_queues // 2
    with contextlib.ExitStack() as undo:
        if net.vhost_mode is VhostMode.SERVER:
            connection = undo.enter_context(_accept(path, attempt))
            with attempt.waiting(connection):
                check_back_end(connection, queues=queue_pairs)
        else:
            connection, _ = open_connection(path, queues=queue_pairs, attempt=attempt, timeout_s=_BACK_END_S)
            undo.enter_context(connection)
        connection.settimeout(None)
        relay = Relay(connection, user=attempt.user)
        undo.pop_all()
    return RelayedBacking(device_id=device_id, path=relay.path, relay=relay)


def _accept(path: str, attempt: Attempt) -> socket.socket:
    """Listen at `path` until a back end connects; the socket file is gone afterwards."""
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(path)
        except (OSError, ValueError) as error:
            raise VhostUserListenError from error
        try:
            listener.listen(1)
            # A socket with a time-out of its own would not notice that it was shut down.
            with attempt.waiting(listener):
                if not select.select([listener], [], [], _BACK_END_S)[0]:
                    raise TimeoutError
                connection, _ = listener.accept()
        except TimeoutError as error:
            raise VhostUserNoBackend(path) from error
        except OSError as error:
            raise VhostUserListenError from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
    return connection
