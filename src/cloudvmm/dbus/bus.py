"""The connection to a message bus: where it is, who lets us in, and whole messages in both directions.

What a message means is not decided here. One thread may send while another receives.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Final

from jeepney.bus import get_connectable_addresses
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import prep_socket
from jeepney.low_level import Message, calc_msg_size

from cloudvmm.dbus.error import BusLost, NameRefused, NameTaken, NoBus
from cloudvmm.dbus.message import BODY_LIMIT_BYTES, Incoming

TIMEOUT_S: Final = 5.0

_SYSTEM_BUS: Final = "unix:path=/var/run/dbus/system_bus_socket"
_READ_BYTES: Final = 65536
_FIXED_BYTES: Final = 16  # of a message's head; they tell its length
# Of the head of a message that is too long to keep; one whose head is longer is not understood.
HEAD_LIMIT_BYTES: Final = 64 << 10
_LARGEST_BYTES: Final = 128 << 20
_LAST_SERIAL: Final = 0xFFFF_FFFF

_REPLACE_EXISTING, _DO_NOT_QUEUE = 2, 4
_PRIMARY_OWNER, _ALREADY_OWNER = 1, 4


def bus_address(*, system_bus: bool) -> str:
    """Return where the bus is, from the environment, else the usual place.

    :raises NoBus: there is no usual place for a session.
    """
    if system_bus:
        return os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _SYSTEM_BUS
    if address := os.environ.get("DBUS_SESSION_BUS_ADDRESS"):
        return address
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        return f"unix:path={folder}/bus"
    raise NoBus


class Bus:
    """Owns the socket. Descriptors are not negotiated, so the bus passes none on to us."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._left = bytearray()
        self._early: list[Incoming] = []
        self._last_serial = 0

    @classmethod
    def at(cls, address: str) -> Bus:
        """Connect to the first bus of `address` that answers, and make ourselves known.

        :raises NoBus: none does within `TIMEOUT_S`; the cause tells why.
        """
        try:
            bus = cls(_connect(address))
        except (OSError, ValueError, RuntimeError) as error:
            raise NoBus(f"No message bus lets us in at {address}") from error
        with contextlib.ExitStack() as undo:
            undo.callback(bus.close)
            try:
                bus._ask(message_bus.Hello())
            except (OSError, BusLost) as error:
                raise NoBus(f"The message bus at {address} does not answer") from error
            undo.pop_all()
        return bus

    def take_name(self, service_name: str) -> None:
        """:raises DbusServerError: it is another's, or not for us."""
        try:
            answer = self._ask(message_bus.RequestName(service_name, _REPLACE_EXISTING | _DO_NOT_QUEUE))
        except (OSError, BusLost) as error:
            raise NameRefused(f"The message bus does not answer about the name {service_name}") from error
        value = answer.values()[0]
        if answer.error_name:
            raise NameRefused(str(value))
        if value not in (_PRIMARY_OWNER, _ALREADY_OWNER):
            raise NameTaken

    def next_serial(self) -> int:
        """Return the number that an answer to the next message will refer to."""
        return self._last_serial % _LAST_SERIAL + 1

    def release_name(self, service_name: str) -> None:
        """Give the name back; the bus answers."""
        self.send(message_bus.ReleaseName(service_name))

    def send(self, message: Message) -> None:
        """Send `message`. Blocks while the bus takes nothing.

        :raises OSError: the connection is broken.
        """
        raw = message.serialise(serial=self.next_serial())
        self._last_serial = self.next_serial()
        self._socket.sendall(raw)

    def receive(self) -> Iterator[Incoming | None]:
        """Wait for messages and give each; None for one that makes no sense.

        :raises BusLost: the bus has closed the connection, or what it sends is no D-Bus.
        :raises OSError: the connection is broken.
        """
        while self._early:
            yield self._early.pop(0)
        while True:
            yield self._receive()

    def cut(self) -> None:
        """Let go whoever sends or receives. Any thread may call this."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Only once nobody sends or receives."""
        self._socket.close()

    def _ask(self, call: Message) -> Incoming:
        """Send `call` to the bus itself and wait for its answer; what else comes is kept."""
        deadline = time.monotonic() + TIMEOUT_S
        self._socket.settimeout(TIMEOUT_S)
        serial = self.next_serial()
        self.send(call)
        while (message := self._receive()) is None or not message.answers(serial):
            if message is not None:
                self._early.append(message)
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        self._socket.settimeout(None)
        return message

    def _receive(self) -> Incoming | None:
        try:
            raw, is_cut = self._receive_raw()
        except (KeyError, ValueError) as error:
            raise BusLost("The message bus does not speak D-Bus") from error
        try:
            return Incoming(raw, is_cut=is_cut)
        except Exception:
            # Whatever the parser makes of a header that it does not know; the next message stands for itself.
            return None

    def _receive_raw(self) -> tuple[bytes, bool]:
        """Return a whole message, or its head and True where the rest is too long."""
        self._fill(_FIXED_BYTES)
        size: int = calc_msg_size(bytes(self._left[:_FIXED_BYTES]))
        if size > _LARGEST_BYTES:
            raise ValueError(size)
        is_cut = size > HEAD_LIMIT_BYTES + BODY_LIMIT_BYTES
        kept = HEAD_LIMIT_BYTES if is_cut else size
        self._fill(kept)
        raw = bytes(memoryview(self._left)[:kept])
        del self._left[:kept]
        self._skip(size - kept)
        return raw, is_cut

    def _skip(self, size: int) -> None:
        while size:
            self._fill(1)
            piece = min(size, len(self._left))
            del self._left[:piece]
            size -= piece

    def _fill(self, size: int) -> None:
        while len(self._left) < size:
            piece = self._socket.recv(_READ_BYTES)
            if not piece:
                raise BusLost
            self._left += piece


def _connect(address: str) -> socket.socket:
    failure: OSError | ValueError | None = None
    for path in get_connectable_addresses(address):
        try:
            connected: socket.socket = prep_socket(path, timeout=TIMEOUT_S)
            return connected
        except (OSError, ValueError) as error:
            failure = error
    raise failure or ValueError(f"{address} names no socket")
