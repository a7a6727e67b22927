"""Bytes both ways between QEMU and a link, by a thread of their own: what a postcopy goes on over.

Each direction is cut into frames: four bytes for the length, big-endian, and as many bytes; a frame of
nothing is the end. The length 0xffffffff is a mark, of which each side may send one.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from cloudvmm.engine.base import EngineError, EngineTimeout, LinkLost, StateError
from cloudvmm.engine.qemu.migration import FRAME_BYTES
from cloudvmm.engine.qemu.migration_watch import SILENCE_S
from cloudvmm.host.eventfd import EventFd

_LENGTH: Final = struct.Struct(">I")
_MARK: Final = 0xFFFF_FFFF
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_CHUNK_BYTES: Final = 256 * 1024
_SLICE_MS: Final = 1000


class Pump:
    """Carries bytes both ways between QEMU, at `near`, which it owns, and a link, by a thread of its own.

    `link_fd` is lent. With `has_marks` each side is to send its mark. `expects` is a side to which something
    comes as long as the other has not ended. A QEMU whose link is lost is left as it is until `close`.
    """

    def __init__(self, near: socket.socket, link_fd: int, *, has_marks: bool, expects: bool) -> None:
        """:raises LinkLost: the link is no socket."""
        self._near = near
        try:
            self._link = socket.socket(fileno=os.dup(link_fd))
        except OSError as error:
            near.close()
            raise LinkLost("The link is no socket") from error
        self.carried_bytes = 0
        self._expects = expects
        self._wake = EventFd()
        self._changed = threading.Condition()
        self._error: EngineError | None = None
        self._has_ended = self._is_stopped = False
        self._was_marked = self._has_marked = not has_marks
        self._owes_mark = False
        self._out = self._in = memoryview(b"")
        self._near_at_end = self._link_at_end = False
        self._head = b""
        self._left = 0  # bytes of the frame that comes in
        self._frame = bytearray()
        self._thread = threading.Thread(target=self._run, name="postcopy", daemon=True)
        self._thread.start()

    def mark(self) -> None:
        """Send the mark, behind what QEMU has written so far."""
        self._owes_mark = True
        self._wake.write()

    def wait_mark(self, *, timeout_s: float) -> bool:
        """Block until the other side's mark has come; return whether it has.

        :raises EngineError: it cannot come any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._was_marked or self._has_ended, timeout_s)
            if not self._was_marked and self._has_ended:
                raise self._error or LinkLost("The other side is gone")
            return self._was_marked

    def wait_end(self, *, timeout_s: float) -> bool:
        """Block until both directions have come to their end; return whether they have.

        :raises EngineError: they will not.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended, timeout_s)
            if self._error is not None:
                raise self._error
            return self._has_ended

    def play_receiver(self, last: bytes, *, check: Callable[[], None]) -> None:
        """Blocking. Say `last` to QEMU in the other side's place, and drop what it sends until it has ended.

        What `check` raises ends it.

        :raises EngineTimeout: QEMU does nothing.
        """
        self._stop()
        left = memoryview(bytes(self._in) + last)
        moved_s = time.monotonic()
        while not self._near_at_end:
            poll = select.poll()
            poll.register(self._near, select.POLLIN | (select.POLLOUT if left else 0))
            poll.poll(_SLICE_MS)
            try:
                left = left[self._near.send(left, _FLAGS) if left else 0 :]
                self._near_at_end = not self._near.recv(FRAME_BYTES, _FLAGS)
                moved_s = time.monotonic()
            except BlockingIOError:
                check()
            except OSError:
                return
            if time.monotonic() - moved_s > SILENCE_S:
                raise EngineTimeout("QEMU does not come to the end of the migration")

    def close(self) -> None:
        """Blocking. End it, and let QEMU see that. Idempotent."""
        self._stop()
        self._near.close()
        self._link.close()
        self._wake.close()

    def _stop(self) -> None:
        self._is_stopped = True
        if self._thread.is_alive():
            self._wake.write()
            self._thread.join()

    def _run(self) -> None:
        error: EngineError | None = None
        try:
            moved_s = time.monotonic()
            while not self._is_stopped and not self._is_over():
                if self._move_out() | self._move_in():
                    moved_s = time.monotonic()
                    continue
                self._wait()
                if self._is_owed() and time.monotonic() - moved_s > SILENCE_S:
                    raise EngineTimeout(f"The other side did nothing for {SILENCE_S:g} s")
        except EngineError as caught:
            error = caught
        with self._changed:
            self._error = error
            self._has_ended = True
            self._changed.notify_all()

    def _is_over(self) -> bool:
        are_marked = self._was_marked and self._has_marked
        return are_marked and self._near_at_end and self._link_at_end and not self._out and not self._in

    def _is_owed(self) -> bool:
        """Whether it is the other side's turn to do something."""
        return bool(self._out) or (self._expects and not self._link_at_end)

    def _move_out(self) -> bool:
        if not self._out:
            self._out = memoryview(self._next_out())
        if not self._out:
            return False
        try:
            sent = self._link.send(self._out, _FLAGS)
        except BlockingIOError:
            return False
        except OSError as error:
            raise LinkLost("The other side is gone") from error
        self._out = self._out[sent:]
        return True

    def _next_out(self) -> bytes:
        owes_mark = self._owes_mark  # looked at first: what QEMU wrote before `mark` is there now
        if self._near_at_end and not owes_mark:
            return b""
        data: bytes | None = None
        if not self._near_at_end:
            try:
                data = self._near.recv(FRAME_BYTES, _FLAGS)
            except BlockingIOError:
                pass
            except OSError:
                data = b""
        if data is not None:
            self._near_at_end = not data
            self.carried_bytes += len(data)
            return _LENGTH.pack(len(data)) + data
        if owes_mark:
            return self._take_mark()
        return b""

    def _take_mark(self) -> bytes:
        self._owes_mark = False
        self._has_marked = True
        return _LENGTH.pack(_MARK)

    def _move_in(self) -> bool:
        if self._in:
            try:
                self._in = self._in[self._near.send(self._in, _FLAGS) :]
            except BlockingIOError:
                return False
            except OSError:  # QEMU has closed its end: why, it says itself
                self._in = memoryview(b"")
            return True
        if self._link_at_end and self._was_marked:
            return False
        try:
            data = self._link.recv(min(self._left or _LENGTH.size - len(self._head), _CHUNK_BYTES), _FLAGS)
        except BlockingIOError:
            return False
        except OSError as error:
            raise LinkLost("The other side is gone") from error
        if not data:
            raise LinkLost("The other side is gone")
        self._take(data)
        return True

    def _take(self, data: bytes) -> None:
        if self._left:
            self._left -= len(data)
            self.carried_bytes += len(data)
            self._frame += data
            if not self._left:
                self._in, self._frame = memoryview(self._frame), bytearray()
            return
        self._head += data
        if len(self._head) < _LENGTH.size:
            return
        (length,) = _LENGTH.unpack(self._head)
        self._head = b""
        if length == _MARK:
            with self._changed:
                self._was_marked = True
                self._changed.notify_all()
        elif length > FRAME_BYTES:
            raise StateError(f"The state comes in frames of {length} bytes, which is too much")
        elif length:
            self._left = length
        else:
            self._link_at_end = True  # QEMU is not told: it would call that a lost connection

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        is_reading = not self._in and not (self._link_at_end and self._was_marked)
        for sock, reads, writes in (
            (self._near, not self._out and not self._near_at_end, bool(self._in)),
            (self._link, is_reading, bool(self._out)),
        ):
            events = (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0)
            if events:  # without any, poll would tell of a hang-up over and over
                poll.register(sock, events)
        poll.poll(_SLICE_MS)
        self._wake.read()
