"""Fuzz what is answered by programs that serve a device: back ends of vhost-user, swtpm, passt.

All that one will ever say has come before it is asked, then it leaves. What must hold: it is good enough, or
refused with a DeviceError within the time that it has; the configuration it tells of is as long as was asked.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Hashable

from cloudvmm.engine.base import DeviceError
from cloudvmm.engine.qemu.tpm import _check_capabilities
from cloudvmm.engine.qemu.user_net import _await_answer
from cloudvmm.engine.qemu.vhost_user import check_back_end
from cloudvmm.vhost.message import Kind
from named import fed, named_target, words_of
from runner import main

QUEUES = 2
CONFIG_BYTES = 60


class _Alive:
    """A companion that has not ended."""

    def check(self) -> None:
        """It has nothing to tell."""


def _vhost_user(raw: bytes) -> Hashable:
    with fed(raw) as near:
        try:
            config = check_back_end(near, queues=QUEUES, config_bytes=CONFIG_BYTES)
        except DeviceError as error:
            return type(error).__name__, words_of(error), _left(near)
        assert len(config) in (0, CONFIG_BYTES)
        return len(config), _left(near)


def _swtpm(raw: bytes) -> Hashable:
    with fed(raw) as near:
        try:
            _check_capabilities(near)
        except DeviceError as error:
            return words_of(error)
    return "good"


def _passt(raw: bytes) -> Hashable:
    with fed(raw) as near:
        try:
            _await_answer(near, _Alive())  # type: ignore[arg-type]
        except DeviceError as error:
            return words_of(error), type(error.__cause__).__name__, _left(near)
        return "good", _left(near)


def _left(near: socket.socket) -> int:
    """How much was not read, roughly."""
    return len(near.recv(1 << 16)).bit_length()


def _answer(kind: int, number: int) -> bytes:
    return struct.pack("=IIIQ", kind, 5, 8, number)


TARGET = named_target(
    "companion_answer",
    {"vhost-user": _vhost_user, "swtpm": _swtpm, "passt": _passt},
    words=(
        *(_answer(Kind.GET_FEATURES, 1 << 30 | 1 << 32), _answer(Kind.GET_PROTOCOL_FEATURES, 1 << 9 | 1)),
        *(_answer(Kind.GET_QUEUE_NUM, 2), struct.pack("=III", Kind.GET_CONFIG, 5, 72), bytes(72)),
        *(b"\x08\x06", b"\0\0\0\x0e", b"\xff\xff\xff\xff"),
    ),
    share=0.06,
)

if __name__ == "__main__":
    main(TARGET)
