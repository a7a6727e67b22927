"""One split virtqueue in the guest's memory: what the driver offers is taken, what was done is given back.

The driver is not trusted. Whatever it writes, nothing outside the guest's memory is read or written, and
nothing is walked for ever: at the first breach of the rules `RingBroken` is raised.

Indices are read and written by whole 16-bit accesses of the machine (`memoryview.cast`), and x86 keeps reads
among themselves and writes among themselves in order. The one order that it does not keep, a write before a
later read, is made by `_fence`. Indirect descriptors and event indices are not offered, and not understood.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from typing import Final

from cloudvmm.vhost.error import MemoryUnknown, RingBroken
from cloudvmm.vhost.memory import Memory

SIZE_LIMIT: Final = 1024

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_USED: Final = struct.Struct("<II")
_HAS_NEXT: Final = 1
_IS_WRITABLE: Final = 2
_IS_INDIRECT: Final = 4
_NO_INTERRUPT: Final = 1
_NO_NOTIFY: Final = 1
_ONE: Final = struct.pack("=Q", 1)

_FENCE: Final = threading.Lock()


def _fence() -> None:
    """Let no later read overtake an earlier write: a lock is taken by a locked instruction."""
    with _FENCE:
        pass


class Chain:
    """One buffer of the driver: what may be read comes before what may be written."""

    __slots__ = ("head", "readable", "writable")

    def __init__(self, head: int) -> None:
        self.head = head
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []


class Ring:
    """Owns its descriptors. `next_index` is that of the next buffer to take, modulo 2**16."""

    def __init__(self) -> None:
        self.size = 0
        self.next_index = 0
        self.is_enabled = False
        self.kick_fd = -1
        self._call_fd = -1
        self._addresses: tuple[int, int, int] | None = None
        self._memory: Memory | None = None
        self._descriptors: memoryview | None = None
        self._available: memoryview | None = None
        self._used: memoryview | None = None
        self._used_indices: memoryview | None = None
        self._used_index = 0
        self._is_broken = False

    @property
    def is_running(self) -> bool:
        """Whether buffers may be taken."""
        return self.is_enabled and self.kick_fd >= 0 and self._descriptors is not None and not self._is_broken

    def set_size(self, size: int) -> None:
        """:raises RingBroken: it is no power of two, or too large."""
        if not 0 < size <= SIZE_LIMIT or size & (size - 1):
            raise RingBroken(f"A ring cannot have {size} entries")
        self.detach()
        self.size = size

    def set_addresses(self, descriptors: int, used: int, available: int) -> None:
        """Take the front end's own addresses of the three parts."""
        self.detach()
        self._addresses = (descriptors, used, available)

    def attach(self, memory: Memory) -> None:
        """Find the parts in `memory`; nothing happens while they are not known.

        :raises RingBroken: they are not there.
        """
        self.detach()
        if self._addresses is None or not self.size:
            return
        descriptors, used, available = self._addresses
        try:
            self._descriptors = memory.at_user(descriptors, 16 * self.size)
            self._available = memory.at_user(available, 4 + 2 * self.size).cast("H")
            self._used = memory.at_user(used, 4 + 8 * self.size)
            self._used_indices = self._used[:4].cast("H")
        except MemoryUnknown as error:
            self.detach()
            raise RingBroken("A ring is not in the guest's memory") from error
        self._memory = memory
        self._used_index = self._used_indices[1]
        self._is_broken = False

    def detach(self) -> None:
        """Let go of all memory. Idempotent."""
        for view in (self._used_indices, self._used, self._available, self._descriptors):
            if view is not None:
                view.release()
        self._used_indices = self._used = self._available = self._descriptors = None

    def set_kick(self, fd: int) -> None:
        """Own `fd`, which the driver's side rings; -1 is none."""
        fd, self.kick_fd = self.kick_fd, fd
        if fd >= 0:
            os.close(fd)

    def hear_kick(self) -> None:
        """Take note that the driver has rung. Never blocks."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.kick_fd, 8)

    def set_call(self, fd: int) -> None:
        """Own `fd`, which is rung for the driver; -1 is none."""
        fd, self._call_fd = self._call_fd, fd
        if fd >= 0:
            os.close(fd)

    def stop(self) -> int:
        """Take no buffers until it is set up anew; return the index of the next one."""
        self.detach()
        self._addresses = None
        self.set_kick(-1)
        self.set_call(-1)
        return self.next_index

    def take(self) -> Chain | None:
        """Return the next buffer that the driver offers; None where there is none.

        :raises RingBroken: the driver breaks the rules; the ring stands still from now on.
        """
        assert self._available is not None
        offered = self._available[1] - self.next_index & 0xFFFF
        if not offered:
            return None
        try:
            if offered > self.size:
                raise RingBroken(f"A driver offers {offered} buffers in {self.size} entries")
            chain = self._walk(self._available[2 + self.next_index % self.size])
        except RingBroken:
            self._is_broken = True
            raise
        self.next_index = self.next_index + 1 & 0xFFFF
        return chain

    def put_back(self) -> None:
        """Undo the last `take`."""
        self.next_index = self.next_index - 1 & 0xFFFF

    def give(self, chain: Chain, written: int) -> None:
        """Give a buffer back, `written` bytes of it filled. `notify` tells the driver."""
        assert self._used is not None and self._used_indices is not None
        _USED.pack_into(self._used, 4 + 8 * (self._used_index % self.size), chain.head, written)
        self._used_index = self._used_index + 1 & 0xFFFF
        self._used_indices[1] = self._used_index

    def notify(self) -> None:
        """Tell the driver what was given back, unless it does not care."""
        assert self._available is not None
        _fence()
        if self._call_fd >= 0 and not self._available[0] & _NO_INTERRUPT:
            with contextlib.suppress(OSError):  # its counter is full: it was rung often enough
                os.write(self._call_fd, _ONE)

    def mute(self) -> None:
        """Ask the driver not to ring for what it offers."""
        assert self._used_indices is not None
        self._used_indices[0] = _NO_NOTIFY

    def unmute(self) -> bool:
        """Ask the driver to ring; return whether it has offered something before it could know."""
        assert self._used_indices is not None and self._available is not None
        self._used_indices[0] = 0
        _fence()
        return self._available[1] != self.next_index

    def mark_broken(self) -> None:
        """Let it stand still: what a buffer of it holds breaks the device's rules."""
        self._is_broken = True

    def _walk(self, head: int) -> Chain:
        assert self._descriptors is not None
        chain = Chain(head)
        index = head
        for _ in range(self.size):
            if index >= self.size:
                raise RingBroken(f"Descriptor {index} is outside a ring of {self.size} entries")
            address, size, flags, index = _DESCRIPTOR.unpack_from(self._descriptors, 16 * index)
            if flags & _IS_INDIRECT:
                raise RingBroken("A driver uses an indirect descriptor, which was not offered")
            if flags & _IS_WRITABLE:
                target = chain.writable
            elif chain.writable:
                raise RingBroken("A readable descriptor is behind a writable one")
            else:
                target = chain.readable
            self._extend(target, address, size)
            if not flags & _HAS_NEXT:
                return chain
        raise RingBroken("A chain of descriptors does not end")

    def _extend(self, target: list[memoryview], address: int, size: int) -> None:
        assert self._memory is not None
        try:
            target += self._memory.pieces(address, size)
        except MemoryUnknown as error:
            raise RingBroken("A descriptor is outside the guest's memory") from error
