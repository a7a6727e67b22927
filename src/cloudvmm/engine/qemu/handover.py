"""The guest's memory handed to another machine on this host: descriptors over a UNIX socket, no byte copied.

Who sends tells first what there is: a length (32 bits, big-endian) and a JSON array of the pieces, with their
descriptors beside the first byte. Who receives has its QEMU map them and answers one byte once that stands;
until then the guest runs on.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

import msgspec

from cloudvmm.engine.base import EngineTimeout, LinkLost, StateError
from cloudvmm.engine.qemu.memory import RamBacking

MAPPED: Final = b"B"
_LENGTH: Final = struct.Struct(">I")
_MAX_BYTES: Final = 64 * 1024
_MAX_FDS: Final = 253
_SLICE_MS: Final = 100
_SILENCE_S: Final = 60.0
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class MemoryPiece(msgspec.Struct, frozen=True):
    """`name` is the id of a piece of RAM or of a zone, `size` its bytes."""

    name: str
    size: int


def offer_memory(link: socket.socket, memories: dict[str, RamBacking]) -> None:
    """Send the descriptors of `memories`; small enough for the socket to take it at once.

    :raises LinkLost: the other side is gone, or the link is no UNIX socket.
    """
    pieces = [MemoryPiece(name, memory.ram.size) for name, memory in memories.items()]
    fds = array.array("i", [fd for memory in memories.values() for fd in memory.fds])
    raw = msgspec.json.encode(pieces)
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
    try:
        if link.sendmsg([_LENGTH.pack(len(raw)) + raw], beside, _FLAGS) != _LENGTH.size + len(raw):
            raise LinkLost("The memory could not be handed over")
    except OSError as error:
        raise LinkLost("The memory could not be handed over") from error


def take_memory(link_fd: int, undo: contextlib.ExitStack, check: Callable[[], None]) -> dict[str, int]:
    """Blocking. Return the descriptors that `offer_memory` sent, by name; `undo` closes them.

    What `check` raises ends the wait.

    :raises StateError: it is something else. :raises LinkLost: the other side is gone.
    """
    with socket.socket(fileno=os.dup(link_fd)) as link:
        fds: list[int] = []
        undo.callback(_close_all, fds)
        (length,) = _LENGTH.unpack(_read(link, _LENGTH.size, fds, check))
        if length > _MAX_BYTES:
            raise StateError("What is said about the memory is too long")
        raw = _read(link, length, fds, check)
    try:
        pieces = msgspec.json.decode(raw, type=list[MemoryPiece])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateError("What is said about the memory is malformed") from error
    if len(pieces) != len(fds):
        raise StateError(f"{len(pieces)} pieces of memory came with {len(fds)} descriptors")
    for piece, fd in zip(pieces, fds, strict=True):
        if os.fstat(fd).st_size < piece.size:
            raise StateError(f"The memory {piece.name} is smaller than it must be")
    return {piece.name: fd for piece, fd in zip(pieces, fds, strict=True)}


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _read(link: socket.socket, size: int, fds: list[int], check: Callable[[], None]) -> bytes:
    data = b""
    while len(data) < size:
        _wait(link, check)
        try:
            piece, came, _, _ = socket.recv_fds(link, size - len(data), _MAX_FDS, socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        except OSError as error:
            raise LinkLost("The other side is gone") from error
        fds += came
        if not piece:
            raise LinkLost("The other side is gone")
        data += piece
    return data


def _wait(link: socket.socket, check: Callable[[], None]) -> None:
    poll = select.poll()
    poll.register(link, select.POLLIN)
    deadline = time.monotonic() + _SILENCE_S
    while not poll.poll(_SLICE_MS):
        check()
        if time.monotonic() > deadline:
            raise EngineTimeout(f"The other side did nothing for {_SILENCE_S:g} s")
