"""The state of a guest on its way to another machine: QEMU's migration stream, carried in frames.

QEMU writes to a socket of ours and reads from one; between the two it goes over a link that others use
before and after, and through pipes: the system passes it on, and it is not copied into this process. So that
nobody reads what is not theirs, it is cut into frames: four bytes for the length, big-endian, and as many of
the stream; a frame of nothing is its end. Where there are several links each takes a frame in turn. The
receiver answers one byte, over the first, once its machine has it all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from cloudvmm.engine.base import (
    EngineError,
    EngineTimeout,
    LinkLost,
    MachineGone,
    ReceivedFrom,
    SentTo,
    StateError,
    Transferred,
)
from cloudvmm.engine.qemu.handover import MAPPED, offer
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.migration_watch import MAX_BYTES_PER_S, SILENCE_S, MigrationWatch, limit_for, told
from cloudvmm.engine.qemu.process import ChildProcess
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.host.conduit import Conduit

_FD_NAME: Final = "link"
_LENGTH: Final = struct.Struct(">I")
FRAME_BYTES: Final = 1024 * 1024
_SHARED_FRAME_BYTES: Final = 256 * 1024
_RECEIVED: Final = b"R"
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_SLICE_MS: Final = 100
_REPORT_BYTES: Final = 16 * 1024 * 1024
ENDED: Final = ("completed", "failed", "cancelled")


class NotSent(EngineError):
    """QEMU could not send the state; the text is its own words."""


class NotReceived(StateError):
    """QEMU could not go on from what was received; the text is its own words."""


def set_capabilities(control: QmpClient, capabilities: dict[str, bool]) -> None:
    """:raises QmpError: QEMU has not all of them."""
    states = [{"capability": name, "state": is_on} for name, is_on in capabilities.items()]
    control.execute("migrate-set-capabilities", {"capabilities": states})


def begin_migration(
    control: QmpClient,
    command: str,
    far: socket.socket,
    capabilities: dict[str, bool],
    *,
    downtime_ms: int | None = None,
) -> None:
    """Blocking. Have QEMU send to `far`, or receive from there, which is lent.

    :raises NotSent: it refused.
    """
    try:
        set_capabilities(control, capabilities)
        if downtime_ms is not None:
            limits = {"downtime-limit": downtime_ms, "max-bandwidth": MAX_BYTES_PER_S}
            control.execute("migrate-set-parameters", limits)
        control.execute("getfd", {"fdname": _FD_NAME}, fds=[far.fileno()])
        control.execute(command, {"uri": f"fd:{_FD_NAME}"})
    except QmpError as error:
        raise NotSent(error.description) from None  # the same words


def await_end(control: QmpClient) -> dict[str, Any]:
    """Blocking. Wait until a QEMU that has nothing more to carry says what came of it, and return that."""
    deadline = time.monotonic() + SILENCE_S
    while True:
        info: dict[str, Any] = control.execute("query-migrate")
        if info.get("status") in ENDED:
            return info
        left_s = deadline - time.monotonic()
        with contextlib.suppress(EngineTimeout):
            control.wait_event("MIGRATION", timeout_s=min(left_s, 1.0))
        if left_s < 0:
            raise EngineTimeout("QEMU does not come to the end of the migration")


def refusal_of(process: ChildProcess) -> EngineError:
    """Return why a QEMU that could not take a state ended, in its words."""
    with contextlib.suppress(EngineTimeout):
        process.wait(timeout_s=5)
    return NotReceived(process.complaint() or "QEMU could not take the state")


class Carrier:
    """Moves bytes between links and a QEMU that `process` is; all is lent. Ends soon when QEMU does."""

    def __init__(self, control: QmpClient, process: ChildProcess, link_fds: Sequence[int]) -> None:
        """:raises LinkLost: a link is no socket. :raises EngineError: the system has no descriptor left."""
        self._control = control
        self._process = process
        self._links: list[socket.socket] = []
        try:
            for link_fd in link_fds:
                self._links.append(link := socket.socket(fileno=os.dup(link_fd)))
                link.setblocking(False)
        except OSError as error:
            self._close_links()
            raise LinkLost("The link is no socket") from error
        try:
            self._conduit = Conduit()
        except OSError as error:
            self._close_links()
            raise EngineError("The system has no descriptor left") from error
        self._turns = itertools.cycle(self._links)
        self._carried_bytes = 0

    def close(self) -> None:
        self._close_links()
        self._conduit.close()

    def send(
        self,
        target: SentTo,
        *,
        memories: dict[str, RamBacking],
        taps: dict[str, list[int]],
        reader: QmpClient,
        unlock: Callable[[], None],
        finish_disks: Callable[[], None] | None = None,
    ) -> float:
        """Blocking. Send all, from a guest that runs until little is left; `unlock` when it runs no more.

        To a local target `memories` are handed over instead, and `taps`, queues by device, besides.
        `finish_disks` is called when the guest stands still. Return since when that is, on the monotonic
        clock. `reader` is asked how far it is.

        :raises NotSent: QEMU refused, or failed. :raises LinkLost: the other side is gone.
        """
        if target.is_local:
            offer(self._links[0], memories, taps)
            if self._read(self._links[0], 1) != MAPPED:
                raise LinkLost("The other side did not say that it has the memory")
        near, far = socket.socketpair()
        with near:
            with far:
                self._begin(
                    "migrate",
                    far,
                    is_ram_apart=target.is_local and bool(memories),
                    downtime_ms=limit_for(target.downtime_ms),
                    has_stop=finish_disks is not None,
                )
            # The guest stands still from some moment in `_forward` on: who watches is waited for later.
            with MigrationWatch(reader, target, lambda: self._carried_bytes, at_stop=finish_disks):
                self._forward(near)
                ended_s = time.monotonic()
                info = self._check_sent()
                unlock()
                self._write(next(self._turns), _LENGTH.pack(0))
                if self._read(self._links[0], 1) != _RECEIVED:
                    raise LinkLost("The other side did not say that it has the state")
        target.on_transferred(told(info, self._carried_bytes))
        downtime_ms: int = info.get("downtime", 0)
        return ended_s - downtime_ms / 1000

    def cancel(self) -> None:
        """Blocking. Have a QEMU that still sends give up."""
        with contextlib.suppress(EngineError):
            self._control.execute("migrate_cancel")

    def receive(self, source: ReceivedFrom, *, is_ram_apart: bool, lock: Callable[[], None]) -> None:
        """Blocking. Have QEMU take all that comes; `lock` then, and say so.

        With `is_ram_apart` it has the memory already.

        :raises StateError: it is no state of such a machine. :raises LinkLost: the other side is gone.
        """
        near, far = socket.socketpair()
        with near:
            with far:
                self._begin("migrate-incoming", far, is_ram_apart=is_ram_apart)
            if source.is_local:
                self._write(self._links[0], MAPPED)
            near.setblocking(False)
            reported_bytes = 0
            while length := self._read_length(link := next(self._turns)):
                self._feed(near, link, length)
                self._carried_bytes += length
                if self._carried_bytes - reported_bytes >= _REPORT_BYTES:
                    reported_bytes = self._carried_bytes
                    source.on_transferred(Transferred(bytes=reported_bytes))
            source.on_transferred(Transferred(bytes=self._carried_bytes))
        self._check_received()
        lock()
        with contextlib.suppress(LinkLost):  # who is gone is missed by whoever speaks with it next
            self._write(self._links[0], _RECEIVED)

    def _close_links(self) -> None:
        for link in self._links:
            with contextlib.suppress(OSError):
                link.setblocking(True)  # as it was lent
            link.close()

    def _begin(
        self,
        command: str,
        far: socket.socket,
        *,
        is_ram_apart: bool,
        downtime_ms: int | None = None,
        has_stop: bool = False,
    ) -> None:
        # A guest that came with postcopy has a QEMU that would send so, too.
        capabilities = {
            "events": True,
            "x-ignore-shared": is_ram_apart,
            "postcopy-ram": False,
            "pause-before-switchover": has_stop,
        }
        begin_migration(self._control, command, far, capabilities, downtime_ms=downtime_ms)

    def _forward(self, near: socket.socket) -> None:
        """Send what QEMU writes until it closes its end."""
        # What the system takes of a frame at once goes on its way while the next is written to the next link.
        frame_bytes = FRAME_BYTES if len(self._links) == 1 else _SHARED_FRAME_BYTES
        near.setblocking(False)
        while length := self._take_in(near, frame_bytes):
            link = next(self._turns)
            self._write(link, _LENGTH.pack(length))
            self._give_out(link)
            self._carried_bytes += length

    def _feed(self, near: socket.socket, link: socket.socket, length: int) -> None:
        """Have QEMU take `length` bytes that come over `link`."""
        while length:
            taken = self._take_in(link, length)
            if not taken:
                raise LinkLost("The other side is gone")
            length -= taken
            try:
                self._give_out(near)
            except LinkLost as error:
                raise refusal_of(self._process) from error

    def _take_in(self, sock: socket.socket, size: int) -> int:
        while True:
            self._wait(sock, select.POLLIN)
            try:
                return self._conduit.take_in(sock.fileno(), size)
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkLost("The other side is gone") from error

    def _give_out(self, sock: socket.socket) -> None:
        while self._conduit.size:
            self._wait(sock, select.POLLOUT)
            try:
                self._conduit.give_out(sock.fileno())
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkLost("The state could not be sent") from error

    def _check_sent(self) -> dict[str, Any]:
        info = await_end(self._control)
        if info.get("status") != "completed":
            raise NotSent(info.get("error-desc", "The migration failed"))
        return info

    def _check_received(self) -> None:
        try:
            if self._has_told_completion():
                return
            info = await_end(self._control)
        except MachineGone as error:
            raise refusal_of(self._process) from error
        if info.get("status") != "completed":
            raise NotReceived(info.get("error-desc", "The migration failed"))

    def _has_told_completion(self) -> bool:
        """Whether QEMU has said that it is done. To ask it costs its guest, which waits, up to some 10 ms."""
        events = self._control.poll_events()
        return any(event.name == "MIGRATION" and event.data["status"] == "completed" for event in events)

    def _read_length(self, link: socket.socket) -> int:
        (length,) = _LENGTH.unpack(self._read(link, _LENGTH.size))
        if length > FRAME_BYTES:
            raise StateError(f"The state comes in frames of {length} bytes, which is too much")
        return int(length)

    def _read(self, link: socket.socket, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(link, select.POLLIN)
            try:
                piece = link.recv(size - len(data), _FLAGS)
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkLost("The other side is gone") from error
            if not piece:
                raise LinkLost("The other side is gone")
            data += piece
        return bytes(data)

    def _write(self, sock: socket.socket, data: bytes) -> None:
        left = memoryview(data)
        while left:
            self._wait(sock, select.POLLOUT)
            try:
                left = left[sock.send(left, _FLAGS) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise LinkLost("The state could not be sent") from error

    def _wait(self, sock: socket.socket, events: int) -> None:
        """:raises MachineGone: QEMU ended. :raises EngineTimeout: nothing moves.

        :raises LinkLost: who is to read has hung up, though there may be nobody to say so to who writes.
        """
        poll = select.poll()
        poll.register(sock, events | (select.POLLRDHUP if events == select.POLLOUT else 0))
        deadline = time.monotonic() + SILENCE_S
        while True:
            for _, flags in poll.poll(_SLICE_MS):
                if flags & select.POLLRDHUP:
                    raise LinkLost("The other side is gone")
                return
            if self._process.has_ended():
                raise MachineGone("QEMU ended while its state was on the way")
            if time.monotonic() > deadline:
                raise EngineTimeout(f"The other side did nothing for {SILENCE_S:g} s")
