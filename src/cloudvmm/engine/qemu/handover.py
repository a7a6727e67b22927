"""What a machine hands to another on this host: descriptors over a UNIX socket, of memory and of TAP queues.

Who sends tells first what there is: a length (32 bits, big-endian) and a JSON object with the pieces of
memory and the TAPs, with their descriptors in this order beside the first byte. Who receives has its QEMU
take them and answers one byte once that stands; until then the guest runs on.

A TAP has no queues for a second QEMU, so the other machine cannot open it by name; it shares those that there
are. A QEMU that starts on them sets the size of their header to what suits itself, under the one that runs.
`QueueGuard` sets it back at once.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from cloudvmm.config import form
from cloudvmm.engine.base import EngineTimeout, LinkLost, StateError
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.migration_watch import SILENCE_S
from cloudvmm.host.rights import receive_with_fds
from cloudvmm.host.tap import HeaderSize

MAPPED: Final = b"B"
_LENGTH: Final = struct.Struct(">I")
_MAX_BYTES: Final = 64 * 1024
_MAX_FDS: Final = 253
_SLICE_MS: Final = 100
_GUARD_S: Final = 0.001
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class MemoryPiece(msgspec.Struct, frozen=True):
    """`name` is the id of a piece of RAM or of a zone, `size` its bytes."""

    name: str
    size: int


class TapPiece(msgspec.Struct, frozen=True):
    """`name` is the id of a network device, `queues` the number of its descriptors."""

    name: str
    queues: int


class _Announced(msgspec.Struct, frozen=True):
    memory: list[MemoryPiece]
    taps: list[TapPiece]


class Handover(msgspec.Struct, frozen=True):
    """Descriptors by the ids of pieces of memory and of network devices. Lent."""

    memory: dict[str, int] = msgspec.field(default_factory=dict)
    taps: dict[str, list[int]] = msgspec.field(default_factory=dict)

    @property
    def queues(self) -> list[int]:
        return [fd for fds in self.taps.values() for fd in fds]


def offer(link: socket.socket, memories: dict[str, RamBacking], taps: dict[str, list[int]]) -> None:
    """Send the descriptors of `memories` and `taps`; small enough for the socket to take it at once.

    :raises LinkLost: the other side is gone, or the link is no UNIX socket.
    """
    announced = _Announced(
        memory=[MemoryPiece(name, memory.ram.size) for name, memory in memories.items()],
        taps=[TapPiece(name, len(queues)) for name, queues in taps.items()],
    )
    of_memory = [fd for memory in memories.values() for fd in memory.fds]
    fds = array.array("i", [*of_memory, *(fd for queues in taps.values() for fd in queues)])
    raw = msgspec.json.encode(announced)
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
    try:
        if link.sendmsg([_LENGTH.pack(len(raw)) + raw], beside, _FLAGS) != _LENGTH.size + len(raw):
            raise LinkLost("The memory could not be handed over")
    except OSError as error:
        raise LinkLost("The memory could not be handed over") from error


def take(link_fd: int, undo: contextlib.ExitStack, check: Callable[[], None]) -> Handover:
    """Blocking. Return what `offer` sent; `undo` closes it.

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
        announced = form.decoder(_Announced).decode(raw)
    except form.MALFORMED as error:
        raise StateError("What is said about the memory is malformed") from error
    return _sorted(announced, fds)


def _sorted(announced: _Announced, fds: list[int]) -> Handover:
    wanted = len(announced.memory) + sum(tap.queues for tap in announced.taps)
    if wanted != len(fds) or any(tap.queues < 1 for tap in announced.taps):
        raise StateError(f"{wanted} pieces of memory and TAP queues came with {len(fds)} descriptors")
    left = iter(fds)
    handover = Handover(
        memory={piece.name: next(left) for piece in announced.memory},
        taps={tap.name: [next(left) for _ in range(tap.queues)] for tap in announced.taps},
    )
    for piece in announced.memory:
        if os.fstat(handover.memory[piece.name]).st_size < piece.size:
            raise StateError(f"The memory {piece.name} is smaller than it must be")
    return handover


class QueueGuard:
    """Keeps the header size of TAP `queues`, lent, as it is, for as long as it is entered."""

    def __init__(self, queues: list[int]) -> None:
        """:raises StateError: they are none."""
        try:
            self._sizes = [HeaderSize(fd) for fd in queues]
        except OSError as error:
            raise StateError("What was handed over is no TAP") from error
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tap-guard", daemon=True)

    def __enter__(self) -> QueueGuard:
        if self._sizes:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._sizes:
            self._thread.join()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._end.wait(_GUARD_S)
            for size in self._sizes:
                with contextlib.suppress(OSError):  # the interface is gone
                    size.keep()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _read(link: socket.socket, size: int, fds: list[int], check: Callable[[], None]) -> bytes:
    data = b""
    while len(data) < size:
        _wait(link, check)
        try:
            piece, came, _ = receive_with_fds(
                link, size - len(data), most_fds=_MAX_FDS, flags=socket.MSG_DONTWAIT
            )
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
    deadline = time.monotonic() + SILENCE_S
    while not poll.poll(_SLICE_MS):
        check()
        if time.monotonic() > deadline:
            raise EngineTimeout(f"The other side did nothing for {SILENCE_S:g} s")
