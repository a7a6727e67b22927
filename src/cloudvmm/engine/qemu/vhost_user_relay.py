"""Carries the messages of one vhost-user device between QEMU and a back end whose connection is ours.

QEMU's ``vhost-user`` network needs a path to connect to: it takes no descriptor; and a disk goes on with
another connection. QEMU would wait for a back end, with its guest standing still, where we can wait with a
deadline. Only messages go through here; frames and blocks do not, for which both sides share the guest's
memory.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Final

from cloudvmm.engine.base import DeviceError, MachineGone
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.host.rights import receive_with_fds
from cloudvmm.host.scratch import ScratchFolder
from cloudvmm.host.user import User
from cloudvmm.vhost.message import HEADER, receive

_END_S: Final = 1.0
_RENEW_S: Final = 0.2
_MOST_FDS: Final = 32
_MOST_BYTES: Final = 1 << 16


class Relay:
    """Owns `backend`, and a thread until `close`. QEMU, which is `user`, or us if None, connects to `path`.

    It does so once; or, with `renew`, again and again: that makes a new connection to a back end that hung
    up, and raises `DeviceError` where it cannot. Until it can, nobody listens at `path`.
    """

    def __init__(
        self,
        backend: socket.socket,
        *,
        renew: Callable[[Attempt], socket.socket] | None = None,
        user: User | None = None,
    ) -> None:
        """:raises OSError: there is no place for a socket; `backend` stays the caller's."""
        self._renew = renew
        self._attempt = Attempt("The relay")
        self._folder = ScratchFolder(user)
        self.path = self._folder.socket_path
        try:
            listener = self._listen()
        except BaseException:
            self._folder.close()
            raise
        self._thread = threading.Thread(
            target=self._run, args=(backend, listener), name="vhost-user-relay", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End it; both sides see that the other hung up. Waits for that a second at most. Idempotent."""
        self._attempt.abort()
        self._thread.join(_END_S)

    def _run(self, backend: socket.socket, listener: socket.socket) -> None:
        with self._folder, contextlib.suppress(OSError, MachineGone):
            self._serve(backend, listener)
            while self._renew is not None:
                backend = self._connect(self._renew)
                with contextlib.ExitStack() as undo:
                    undo.enter_context(backend)
                    listener = self._listen()
                    undo.pop_all()
                self._serve(backend, listener)

    def _serve(self, backend: socket.socket, listener: socket.socket) -> None:
        """Let QEMU in, and carry until one side hangs up.

        :raises OSError: QEMU did not come. :raises MachineGone: `close` was called.
        """
        with backend:
            try:
                with listener, self._attempt.waiting(listener):
                    qemu, _ = listener.accept()
            finally:
                os.unlink(self.path)
            if self._renew is None:
                self._folder.close()
            with (
                qemu,
                self._attempt.waiting(qemu),
                self._attempt.waiting(backend),
                contextlib.suppress(OSError),  # in the middle of a message, too
            ):
                _carry(qemu, backend)

    def _connect(self, renew: Callable[[Attempt], socket.socket]) -> socket.socket:
        """:raises MachineGone: `close` was called."""
        while True:
            self._attempt.pause(_RENEW_S)
            with contextlib.suppress(DeviceError):
                return renew(self._attempt)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(self.path)
            self._folder.show_socket()
            listener.listen(1)
        except BaseException:
            listener.close()
            raise
        return listener


def _carry(qemu: socket.socket, backend: socket.socket) -> None:
    """Carry messages both ways until one side hangs up.

    :raises OSError: one did so in the middle of a message.
    """
    other = {qemu: backend, backend: qemu}
    while True:
        readable, _, _ = select.select(list(other), [], [])
        for end in readable:
            if not _carry_one(end, other[end]):
                return


def _carry_one(source: socket.socket, target: socket.socket) -> bool:
    """Carry a message as a whole: descriptors belong to its first byte. False at the end."""
    head, fds, _ = receive_with_fds(source, HEADER.size, most_fds=_MOST_FDS)
    try:
        if not head:
            return False
        message = head + receive(source, HEADER.size - len(head))
        size = HEADER.unpack(message)[2]
        if size > _MOST_BYTES:
            return False
        message += receive(source, size)
        sent = socket.send_fds(target, [message], fds)
        target.sendall(message[sent:])
    finally:
        for fd in fds:
            os.close(fd)
    return True
