"""The state of a guest on its way to another machine: QEMU's migration stream, carried in frames.

QEMU writes to a socket of ours and reads from one; between the two it goes over a link that others use
before and after. So that nobody reads what is not theirs, it is cut into frames: four bytes for the length,
big-endian, and as many of the stream; a frame of nothing is its end. The receiver answers one byte once its
machine has it all.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Final

from cloudvmm.engine.base import EngineError, EngineTimeout, LinkLost, MachineGone, StateError
from cloudvmm.engine.qemu.process import ChildProcess
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError

_FD_NAME: Final = "link"
_LENGTH: Final = struct.Struct(">I")
_FRAME_BYTES: Final = 1024 * 1024
_RECEIVED: Final = b"R"
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_SLICE_MS: Final = 100
_SILENCE_S: Final = 60.0
_BYTES_PER_S: Final = 10 << 30  # no limit: QEMU's own is 128 MiB a second


class NotSent(EngineError):
    """QEMU could not send the state; the text is its own words."""


class NotReceived(StateError):
    """QEMU could not go on from what was received; the text is its own words."""


class Carrier:
    """Moves bytes between a link and a QEMU that `process` is; all is lent. Ends soon when QEMU does."""

    def __init__(self, control: QmpClient, process: ChildProcess, link_fd: int) -> None:
        """:raises LinkLost: the link is no socket."""
        self._control = control
        self._process = process
        try:
            self._link = socket.socket(fileno=os.dup(link_fd))
        except OSError as error:
            raise LinkLost("The link is no socket") from error

    def close(self) -> None:
        self._link.close()

    def send(self, *, downtime_ms: int, unlock: Callable[[], None]) -> None:
        """Blocking. Send all, from a guest that runs until little is left; `unlock` when it runs no more.

        :raises NotSent: QEMU refused, or failed. :raises LinkLost: the other side is gone.
        """
        near, far = socket.socketpair()
        with near:
            with far:
                self._begin("migrate", far, downtime_ms=downtime_ms)
            self._forward(near)
        self._check_sent()
        unlock()
        self._write(self._link, _LENGTH.pack(0))
        if self._read(1) != _RECEIVED:
            raise LinkLost("The other side did not say that it has the state")

    def cancel(self) -> None:
        """Blocking. Have a QEMU that still sends give up."""
        with contextlib.suppress(EngineError):
            self._control.execute("migrate_cancel")

    def receive(self, *, lock: Callable[[], None]) -> None:
        """Blocking. Have QEMU take all that comes; `lock` then, and say so.

        :raises StateError: it is no state of such a machine. :raises LinkLost: the other side is gone.
        """
        near, far = socket.socketpair()
        with near:
            with far:
                self._begin("migrate-incoming", far)
            while length := self._read_length():
                self._feed(near, self._read(length))
        self._check_received()
        lock()
        with contextlib.suppress(LinkLost):  # who is gone is missed by whoever speaks with it next
            self._write(self._link, _RECEIVED)

    def _begin(self, command: str, far: socket.socket, *, downtime_ms: int | None = None) -> None:
        capabilities = {"events": True, "x-ignore-shared": False}
        try:
            self._control.execute(
                "migrate-set-capabilities",
                {"capabilities": [{"capability": name, "state": on} for name, on in capabilities.items()]},
            )
            if downtime_ms is not None:
                limits = {"downtime-limit": downtime_ms, "max-bandwidth": _BYTES_PER_S}
                self._control.execute("migrate-set-parameters", limits)
            self._control.execute("getfd", {"fdname": _FD_NAME}, fds=[far.fileno()])
            self._control.execute(command, {"uri": f"fd:{_FD_NAME}"})
        except QmpError as error:
            raise NotSent(error.description) from None  # the same words

    def _forward(self, near: socket.socket) -> None:
        """Send what QEMU writes until it closes its end."""
        while True:
            self._wait(near, select.POLLIN)
            data = near.recv(_FRAME_BYTES)
            if not data:
                return
            self._write(self._link, _LENGTH.pack(len(data)) + data)

    def _feed(self, near: socket.socket, data: bytes) -> None:
        try:
            self._write(near, data)
        except LinkLost as error:
            raise self._refusal() from error

    def _check_sent(self) -> None:
        info = self._await_end()
        if info.get("status") != "completed":
            raise NotSent(info.get("error-desc", "The migration failed"))

    def _check_received(self) -> None:
        try:
            info = self._await_end()
        except MachineGone as error:
            raise self._refusal() from error
        if info.get("status") != "completed":
            raise NotReceived(info.get("error-desc", "The migration failed"))

    def _await_end(self) -> dict[str, str]:
        deadline = time.monotonic() + _SILENCE_S
        while True:
            info: dict[str, str] = self._control.execute("query-migrate")
            if info.get("status") in ("completed", "failed", "cancelled"):
                return info
            left_s = deadline - time.monotonic()
            with contextlib.suppress(EngineTimeout):
                self._control.wait_event("MIGRATION", timeout_s=min(left_s, 1.0))
            if left_s < 0:
                raise EngineTimeout("QEMU does not come to the end of the migration")

    def _refusal(self) -> EngineError:
        with contextlib.suppress(EngineTimeout):
            self._process.wait(timeout_s=5)
        return NotReceived(self._process.complaint() or "QEMU could not take the state")

    def _read_length(self) -> int:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > _FRAME_BYTES:
            raise StateError(f"The state comes in frames of {length} bytes, which is too much")
        return int(length)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self._link, select.POLLIN)
            try:
                piece = self._link.recv(size - len(data), _FLAGS)
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
        """:raises MachineGone: QEMU ended. :raises EngineTimeout: nothing moves."""
        poll = select.poll()
        poll.register(sock, events)
        deadline = time.monotonic() + _SILENCE_S
        while not poll.poll(_SLICE_MS):
            if self._process.has_ended():
                raise MachineGone("QEMU ended while its state was on the way")
            if time.monotonic() > deadline:
                raise EngineTimeout(f"The other side did nothing for {_SILENCE_S:g} s")
