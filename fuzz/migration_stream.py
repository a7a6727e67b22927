"""Fuzz what a VMM hears from another one: frames, messages, what is offered, what is handed over.

What must hold: a connection gives messages, or one of the errors of `migration.error`; what is read never
goes beyond the message, since what follows may be the engine's; a message that was read can be sent, and is
the same then; what somebody else says is readable text of ours; of descriptors none stays open.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Hashable

from cloudvmm.api import VmReceiveMigrationData
from cloudvmm.control.receive import _examine
from cloudvmm.engine.base import LinkLost, StateError
from cloudvmm.engine.fake import FakeEngine
from cloudvmm.engine.fake import state as fake_state
from cloudvmm.engine.fake.lifeline import Lifeline
from cloudvmm.engine.qemu.handover import take
from cloudvmm.errors import VmmError
from cloudvmm.migration.cut import Cut
from cloudvmm.migration.error import LinkDown, MigrationError, PeerRefused, ProtocolError
from cloudvmm.migration.link import Link
from cloudvmm.migration.message import (
    HEAD,
    KINDS,
    MAGIC,
    Hello,
    Offer,
    Welcome,
    check_welcome,
    choose_version,
    decode_body,
    decode_head,
    encode_message,
)
from json_tree import mutate_json
from named import fed, named_target, words_of
from runner import main

_INFO = FakeEngine().info
_CUT = Cut()
NAMES = [
    *("program", "versions", "role", "token", "number", "version", "config", "vm", "engine", "is_postcopy"),
    *("engine_version", "is_local", "copied_disks", "connections", "is_paused", "stood_ms", "reasons"),
    *("memory", "taps", "name", "size", "queues", "slots", "counter", "vcpus", "ram", "payload", "disks"),
]


def _frames(raw: bytes) -> Hashable:
    """Read messages until the end, each as one of the kind that it says it is."""
    seen: list[Hashable] = []
    with fed(raw) as near:
        link = Link(near, _CUT)
        read = 0
        while len(seen) < 4:
            kind = _announced(raw[read : read + HEAD.size])
            try:
                message = link.receive(kind, timeout_s=60)
            except PeerRefused as error:
                return (*seen, words_of(error))
            except (ProtocolError, LinkDown) as error:
                return (*seen, words_of(error))
            frame = encode_message(message)
            head, length = decode_head(raw[read : read + HEAD.size])
            read += HEAD.size + length
            assert decode_body(head, frame[HEAD.size :]) == message, "sent on, it is another"
            seen.append(_about(message))
    return tuple(seen)


def _announced(head: bytes) -> type:
    number = int.from_bytes(head[4:6])
    return KINDS.get(number, Hello)


def _about(message: object) -> Hashable:
    try:
        if isinstance(message, Hello):
            return "hello", choose_version(message)
        if isinstance(message, Welcome):
            check_welcome(message)
    except ProtocolError as error:
        return words_of(error)
    return type(message).__name__


def _bodies(raw: bytes) -> Hashable:
    """The first byte names the kind; the frame around it is right."""
    number = raw[:1][0] % 10 if raw else 0
    return _frames(HEAD.pack(MAGIC, number, 0, len(raw[1:])) + raw[1:])


def _offer(raw: bytes) -> Hashable:
    try:
        offer = decode_body(Offer, raw)
    except ProtocolError as error:
        return words_of(error)
    assert isinstance(offer, Offer)
    try:
        config, _ = _examine(_INFO, VmReceiveMigrationData(receiver_url="unix:/x"), offer)
    except (MigrationError, VmmError) as error:
        return words_of(error)
    return len(config.disks or ()), len(config.net or ())


def _handover(raw: bytes) -> Hashable:
    before = len(os.listdir("/proc/self/fd"))
    try:
        with contextlib.ExitStack() as undo, fed(raw) as near:
            handover = take(near.fileno(), undo, lambda: None)
            assert not handover.memory and not handover.taps, "what came without descriptors is taken"
            return "taken"
    except (StateError, LinkLost) as error:
        return words_of(error)
    finally:
        assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left"


def _fake(raw: bytes) -> Hashable:
    """The state of a fake guest over a link."""
    try:
        with fed(raw) as near:
            state = fake_state._receive(near.fileno(), Lifeline())
    except (StateError, LinkLost) as error:
        return words_of(error)
    return len(state.asked)


def _mutate(raw: bytes, noise: random.Random) -> bytes:
    """Change the JSON behind a head or a length, and mostly have that say how long it is now."""
    at = raw.find(b"{")
    if at < 0:
        return raw
    body = mutate_json(raw[at:], noise, NAMES)
    head = raw[:at]
    if at in (4, HEAD.size) and noise.random() < 0.9:
        head = head[:-4] + len(body).to_bytes(4)
    return head + body


TARGET = named_target(
    "migration_stream",
    {"frames": _frames, "bodies": _bodies, "offer": _offer, "handover": _handover, "fake": _fake},
    words=(MAGIC, *(HEAD.pack(MAGIC, number, 0, 2) + b"{}" for number in KINDS)),
    mutate=_mutate,
    share=0.08,
)

if __name__ == "__main__":
    main(TARGET)
