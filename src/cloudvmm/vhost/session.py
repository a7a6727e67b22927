"""The back end's side of one vhost-user connection: what the front end sets up, and what it is told.

`Session` keeps the memory and the rings as the front end wants them. Whoever owns it reads the rings'
`kick_fd` after each message, and moves buffers.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

from cloudvmm.vhost.error import ProtocolBroken, RingBroken
from cloudvmm.vhost.memory import Memory, Place
from cloudvmm.vhost.message import FDS_LIMIT, Kind, Message, read_message, write_reply
from cloudvmm.vhost.ring import Ring

VERSION_1: Final = 1 << 32
PROTOCOL_FEATURES: Final = 1 << 30

_OTHER_RINGS: Final = 1 << 28 | 1 << 29 | 1 << 34  # indirect descriptors, event indices, packed rings

_MULTIPLE_QUEUES: Final = 1 << 0
_REPLY_ACK: Final = 1 << 3
_CONFIG: Final = 1 << 9
_MEMORY_SLOTS: Final = 1 << 15
_OFFERED: Final = _MULTIPLE_QUEUES | _REPLY_ACK | _CONFIG | _MEMORY_SLOTS

MEMORY_SLOT_LIMIT: Final = 509  # as many as KVM has had from its beginning
_NO_FD: Final = 1 << 8
_INDEX_MASK: Final = 0xFF

_U64: Final = struct.Struct("=Q")
_STATE: Final = struct.Struct("=II")
_ADDRESSES: Final = struct.Struct("=IIQQQQ")
_PLACE: Final = struct.Struct("=QQQQ")
_TABLE: Final = struct.Struct("=II")
_SETTINGS: Final = struct.Struct("=III")


class Session:
    """Owns the connection, the memory and the rings. `features` are the device's, of its type alone.

    `config` is the device's configuration space.
    """

    def __init__(
        self, connection: socket.socket, *, rings: int, config: bytes = b"", features: int = 0
    ) -> None:
        self.rings = [Ring() for _ in range(rings)]
        self._connection = connection
        self._memory = Memory()
        self._config = config
        self._features = features | VERSION_1 | PROTOCOL_FEATURES
        self._protocol = 0
        self._has_reply = False

    def fileno(self) -> int:
        return self._connection.fileno()

    def serve(self) -> bool:
        """Do what one message says, which must be there already; return False where the front end has left.

        :raises ProtocolBroken: it does not keep to the protocol.
        """
        message = read_message(self._connection)
        if message is None:
            return False
        with contextlib.closing(message):
            handler = _HANDLERS.get(message.kind)
            if handler is None:
                raise ProtocolBroken(f"Message {message.kind} is not among those that were offered")
            self._has_reply = False
            handler(self, message)
            if message.needs_reply and self._protocol & _REPLY_ACK and not self._has_reply:
                self._reply(message, _U64.pack(0))
        return True

    def close(self) -> None:
        """Close everything. Idempotent."""
        for ring in self.rings:
            ring.stop()
        self._memory.close()
        self._connection.close()

    def _reply(self, message: Message, content: bytes) -> None:
        self._has_reply = True
        write_reply(self._connection, message.kind, content)

    def _ring(self, index: int) -> Ring:
        if index >= len(self.rings):
            raise ProtocolBroken(f"There is no ring {index}")
        return self.rings[index]

    def _pass(self, message: Message) -> None:
        """Do nothing: there is one owner, and no errors are told of by a descriptor."""

    def _get_features(self, message: Message) -> None:
        self._reply(message, _U64.pack(self._features))

    def _set_features(self, message: Message) -> None:
        (features,) = message.unpack(_U64)
        # Of other bits the front end may keep some for itself; with these the rings would be others.
        if features & _OTHER_RINGS:
            raise ProtocolBroken(f"Features that were not offered: {features & _OTHER_RINGS:#x}")
        if not features & PROTOCOL_FEATURES:
            for ring in self.rings:
                ring.is_enabled = True

    def _get_protocol_features(self, message: Message) -> None:
        self._reply(message, _U64.pack(_OFFERED))

    def _set_protocol_features(self, message: Message) -> None:
        (features,) = message.unpack(_U64)
        self._protocol = features & _OFFERED

    def _get_queue_num(self, message: Message) -> None:
        self._reply(message, _U64.pack(len(self.rings)))

    def _get_config(self, message: Message) -> None:
        offset, size, flags = message.unpack(_SETTINGS)
        found = self._config[offset : offset + size].ljust(min(size, len(message.content)), b"\0")
        self._reply(message, _SETTINGS.pack(offset, size, flags) + found)

    def _reset(self, message: Message) -> None:
        for ring in self.rings:
            ring.stop()
            ring.is_enabled = False

    def _set_memory(self, message: Message) -> None:
        count, _ = message.unpack(_TABLE)
        content = message.content[_TABLE.size :]
        if count > FDS_LIMIT or len(content) < count * _PLACE.size:
            raise ProtocolBroken(f"A table of {count} memory regions")
        places = [Place(*_PLACE.unpack_from(content, _PLACE.size * index)) for index in range(count)]
        self._change_memory(lambda: self._memory.replace(places, message.fds))

    def _get_memory_slots(self, message: Message) -> None:
        self._reply(message, _U64.pack(MEMORY_SLOT_LIMIT))

    def _add_memory(self, message: Message) -> None:
        place = _one_place(message)
        if not message.fds:
            raise ProtocolBroken("A memory region comes without a descriptor")
        self._change_memory(lambda: self._memory.add(place, message.fds[0]))

    def _remove_memory(self, message: Message) -> None:
        place = _one_place(message)
        self._change_memory(lambda: self._memory.remove(place))

    def _change_memory(self, change: Callable[[], None]) -> None:
        """Rings may be at work: they let go of the memory, and find themselves in it anew.

        One that does not stands still: a region that changes its size goes first and comes back then.
        """
        for ring in self.rings:
            ring.detach()
        change()
        for ring in self.rings:
            with contextlib.suppress(RingBroken):
                ring.attach(self._memory)

    def _set_ring_size(self, message: Message) -> None:
        index, size = message.unpack(_STATE)
        try:
            self._ring(index).set_size(size)
        except RingBroken as error:
            raise ProtocolBroken(str(error)) from error

    def _set_ring_base(self, message: Message) -> None:
        index, base = message.unpack(_STATE)
        self._ring(index).next_index = base & 0xFFFF

    def _set_ring_addresses(self, message: Message) -> None:
        index, _, descriptors, used, available, _ = message.unpack(_ADDRESSES)
        ring = self._ring(index)
        ring.set_addresses(descriptors, used, available)
        try:
            ring.attach(self._memory)
        except RingBroken as error:
            raise ProtocolBroken(str(error)) from error

    def _get_ring_base(self, message: Message) -> None:
        index, _ = message.unpack(_STATE)
        self._reply(message, _STATE.pack(index, self._ring(index).stop()))

    def _set_ring_kick(self, message: Message) -> None:
        self._ring_of_fd(message).set_kick(message.take_fd())

    def _set_ring_call(self, message: Message) -> None:
        self._ring_of_fd(message).set_call(message.take_fd())

    def _ring_of_fd(self, message: Message) -> Ring:
        (value,) = message.unpack(_U64)
        if bool(value & _NO_FD) == bool(message.fds):
            raise ProtocolBroken("A ring's descriptor is announced and missing, or the other way round")
        for fd in message.fds:
            os.set_blocking(fd, False)
        return self._ring(value & _INDEX_MASK)

    def _enable_ring(self, message: Message) -> None:
        index, is_enabled = message.unpack(_STATE)
        self._ring(index).is_enabled = bool(is_enabled)


def _one_place(message: Message) -> Place:
    _, *place = message.unpack(struct.Struct("=QQQQQ"))
    return Place(*place)


_HANDLERS: Final[dict[int, Callable[[Session, Message], None]]] = {
    Kind.GET_FEATURES: Session._get_features,
    Kind.SET_FEATURES: Session._set_features,
    Kind.SET_OWNER: Session._pass,
    Kind.RESET_OWNER: Session._reset,
    Kind.SET_MEM_TABLE: Session._set_memory,
    Kind.SET_VRING_NUM: Session._set_ring_size,
    Kind.SET_VRING_ADDR: Session._set_ring_addresses,
    Kind.SET_VRING_BASE: Session._set_ring_base,
    Kind.GET_VRING_BASE: Session._get_ring_base,
    Kind.SET_VRING_KICK: Session._set_ring_kick,
    Kind.SET_VRING_CALL: Session._set_ring_call,
    Kind.SET_VRING_ERR: Session._pass,
    Kind.GET_PROTOCOL_FEATURES: Session._get_protocol_features,
    Kind.SET_PROTOCOL_FEATURES: Session._set_protocol_features,
    Kind.GET_QUEUE_NUM: Session._get_queue_num,
    Kind.SET_VRING_ENABLE: Session._enable_ring,
    Kind.GET_CONFIG: Session._get_config,
    Kind.SET_CONFIG: Session._pass,
    Kind.GET_MAX_MEM_SLOTS: Session._get_memory_slots,
    Kind.ADD_MEM_REG: Session._add_memory,
    Kind.REM_MEM_REG: Session._remove_memory,
}
