"""Fuzz what comes over a message bus: the stream of messages, and the calls in it.

What must hold: the connection gives messages until BusLost, whatever comes; each call is answered with a
result or a CallError, and either is a message that the bus takes; what a command gets of a body is a value of
its own type.
"""

from __future__ import annotations

import random
from collections.abc import Hashable

from jeepney.low_level import Message, MessageType, Parser

from cloudvmm.dbus.bus import Bus
from cloudvmm.dbus.error import BusLost, CallError, Failed
from cloudvmm.dbus.message import Incoming, error_reply, reply
from cloudvmm.dbus.method import INTERFACE, METHODS
from cloudvmm.dbus.object import ApiObject
from json_tree import mutate_json
from named import fed, named_target
from runner import main

PATH = "/org/cloudhypervisor/DBusApi1"
_OBJECT = ApiObject(PATH)
NAMES = [
    "payload",
    "kernel",
    "cpus",
    "memory",
    "size",
    "disks",
    "path",
    "id",
    "desired_ram",
    "destination_url",
]


def _stream(raw: bytes) -> Hashable:
    seen: list[Hashable] = []
    with fed(raw) as near:
        bus = Bus(near)
        try:
            for message in bus.receive():
                seen.append("nonsense" if message is None else _answered(message))
        except BusLost as error:
            seen.append(str(error)[:20])
    return tuple(seen[:4])


def _answered(message: Incoming) -> Hashable:
    """Do what the server does with it, but for the command."""
    if not message.is_call:
        assert isinstance(message.answers(1), bool)
        return "no call", len(message.error_name) > 0
    try:
        method = _OBJECT.method(message)
        if method is None:
            _check_sent(reply(message, *_OBJECT.answer(message)))
            return message.member
        data = method.decode(message.strings(method.takes))
        assert (method.command.body is None) is (data is None)
        return method.name
    except CallError as error:
        _check_sent(error_reply(message, error))
        return type(error).__name__


def _check_sent(message: Message) -> None:
    (again,) = Parser().feed(message.serialise(serial=1))
    assert again.header.message_type in (MessageType.method_return, MessageType.error)


def _bodies(raw: bytes) -> Hashable:
    """The first line names the method, the rest is its argument."""
    first, _, text = raw.partition(b"\n")
    method = METHODS.get(first.decode(errors="replace"))
    if method is None or method.command.body is None:
        return None
    try:
        method.decode((text.decode(errors="replace"),))
    except Failed as error:
        return method.name, str(error)[:12]
    return method.name


def _mutate(raw: bytes, noise: random.Random) -> bytes:
    first, newline, rest = raw.partition(b"\n")
    return first + newline + mutate_json(rest, noise, NAMES)


TARGET = named_target(
    "dbus_message",
    {"stream": _stream, "body": _bodies},
    words=(
        *(name.encode() for name in METHODS),
        *(f"{name}\n".encode() for name in METHODS),
        *(PATH.encode(), INTERFACE.encode(), b"org.freedesktop.DBus.Properties", b"Get", b"GetAll", b"Set"),
        *(b"Introspect", b"org.freedesktop.DBus.Peer", b"\x06\x01s\x00", b"\x08\x01g\x00\x01s\x00"),
    ),
    mutate=_mutate,
    share=0.1,
)

if __name__ == "__main__":
    main(TARGET)
