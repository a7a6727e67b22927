"""Carries the messages of one vhost-user device between QEMU and a back end whose connection is ours.

QEMU's ``vhost-user`` network needs a path to connect to: it takes no descriptor. And it would wait for a back
end, with its guest standing still, where we can wait with a deadline. Only messages go through here; frames
do not, for which both sides share the guest's memory.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
import threading
from typing import Final

from cloudvmm.vhost.message import HEADER, receive

_END_S: Final = 1.0
_MOST_FDS: Final = 32
_MOST_BYTES: Final = 1 << 16


class Relay:
    """Owns `backend`, and a thread until `close`. QEMU connects to `path`, once."""

    def __init__(self, backend: socket.socket) -> None:
        """:raises OSError: there is no place for a socket; `backend` stays the caller's."""
        self._folder = tempfile.TemporaryDirectory(prefix="cloudvmm-")
        self.path = f"{self._folder.name}/s"
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(self.path)
            self._listener.listen(1)
        except BaseException:
            self._listener.close()
            self._folder.cleanup()
            raise
        self._backend = backend
        self._thread = threading.Thread(target=self._run, name="vhost-user-relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it; both sides see that the other hung up. Waits for that a second at most. Idempotent."""
        for end in (self._listener, self._backend):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._thread.join(_END_S)

    def _run(self) -> None:
        with contextlib.suppress(OSError), self._backend, self._accept() as qemu:
            _carry(qemu, self._backend)

    def _accept(self) -> socket.socket:
        """:raises OSError: nobody came before `close`."""
        try:
            with self._listener:
                return self._listener.accept()[0]
        finally:
            self._folder.cleanup()


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
    head, fds, _, _ = socket.recv_fds(source, HEADER.size, _MOST_FDS, socket.MSG_CMSG_CLOEXEC)
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
