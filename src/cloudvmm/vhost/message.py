"""One message of vhost-user: its framing, its kinds, and the descriptors beside it. No state.

A message is a header of three 32-bit numbers (kind, flags, size of what follows) and its content, all in the
byte order of the host. Descriptors come with its first byte.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from typing import Final

import msgspec

from cloudvmm.host.rights import receive_with_fds
from cloudvmm.vhost.error import ProtocolBroken

HEADER: Final = struct.Struct("=III")
"""Of a message: its kind, flags, bytes that follow."""

VERSION: Final = 1
_VERSION_MASK: Final = 3
IS_REPLY: Final = 4
_NEEDS_REPLY: Final = 8
_CONTENT_LIMIT: Final = 4096
FDS_LIMIT: Final = 8


class Kind(enum.IntEnum):
    """What the front end asks for; the values are the protocol's."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class Message(msgspec.Struct, kw_only=True):
    """`fds` belong to whoever holds the message; `close` ends those that nobody took."""

    kind: int
    needs_reply: bool
    content: bytes
    fds: list[int]

    def take_fd(self) -> int:
        """Return the one descriptor of the message, now the caller's; -1 where it has none."""
        return self.fds.pop(0) if self.fds else -1

    def unpack(self, form: struct.Struct) -> tuple[int, ...]:
        """Return the numbers that `content` begins with.

        :raises ProtocolBroken: it is too short.
        """
        if len(self.content) < form.size:
            raise ProtocolBroken(f"Message {self.kind} is too short: {len(self.content)} bytes")
        return form.unpack_from(self.content)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def read_message(connection: socket.socket) -> Message | None:
    """Blocking. Return the next message, None where the front end has left.

    :raises ProtocolBroken: what came is no message.
    """
    try:
        start, fds, is_cut = receive_with_fds(connection, HEADER.size, most_fds=FDS_LIMIT)
    except ConnectionResetError:
        return None
    message = Message(kind=0, needs_reply=False, content=b"", fds=fds)
    try:
        if not start and not fds:
            return None
        if is_cut:
            raise ProtocolBroken("A message has too many descriptors")
        kind, bits, size = HEADER.unpack(start + _read(connection, HEADER.size - len(start)))
        if bits & _VERSION_MASK != VERSION or size > _CONTENT_LIMIT:
            raise ProtocolBroken(f"No message: kind {kind}, flags {bits:#x}, {size} bytes")
        message.kind, message.needs_reply = kind, bool(bits & _NEEDS_REPLY)
        message.content = _read(connection, size)
    except BaseException:
        message.close()
        raise
    return message


def receive(connection: socket.socket, size: int) -> bytes:
    """Blocking, as long as the socket's time-out allows. Read `size` bytes.

    :raises ConnectionResetError: the other side has left.
    :raises OSError: they do not come.
    """
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return data


def write_reply(connection: socket.socket, kind: int, content: bytes) -> None:
    """Blocking. Answer the message `kind`; nothing happens where the front end has left."""
    try:
        connection.sendall(HEADER.pack(kind, VERSION | IS_REPLY, len(content)) + content)
    except (BrokenPipeError, ConnectionResetError):
        return


def _read(connection: socket.socket, size: int) -> bytes:
    try:
        return receive(connection, size)
    except ConnectionResetError:
        raise ProtocolBroken("The front end left in the middle of a message") from None
