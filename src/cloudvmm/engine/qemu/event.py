"""From what QEMU tells unasked to the events of the seam.

`EventStream` belongs to the control loop: one descriptor to poll, and a take that never blocks.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any, Final

from cloudvmm.engine.base import (
    BalloonChanged,
    EngineError,
    EngineEvent,
    Exited,
    GuestPanicked,
    MachineGone,
    PciChanged,
    PoweredOff,
    ResetRequested,
)
from cloudvmm.engine.qemu.codec import Event

if TYPE_CHECKING:
    from cloudvmm.engine.qemu.driver import DriverWatch
    from cloudvmm.engine.qemu.process import QemuProcess
    from cloudvmm.engine.qemu.qmp import QmpClient

_CANNOT_GO_ON: Final = "internal-error"


def translate(event: Event) -> EngineEvent | None:
    """Return what `event` means to the seam, or None where it means nothing there."""
    match event.name:
        case "SHUTDOWN":
            return _translate_shutdown(event.data.get("reason"))
        case "WATCHDOG":
            return ResetRequested(by_watchdog=True)
        case "GUEST_PANICKED":
            return GuestPanicked("panic")
        case "GUEST_CRASHLOADED":
            return GuestPanicked("crash_loaded")
        case "BALLOON_CHANGE":
            return BalloonChanged(event.data["actual"])
        case "RESET" | "DEVICE_DELETED":
            return PciChanged()
        case _:
            return None


def _translate_shutdown(reason: object) -> EngineEvent | None:
    if reason == "guest-reset":
        return ResetRequested()
    if reason in ("guest-shutdown", "guest-panic"):
        return PoweredOff()
    return None  # asked for from outside; the end of the process follows


class EventStream:
    """Owns an epoll over `client` (a monitor whose negotiation is done) and `process`; both are lent.

    `expect_end` makes the end of the process no event: somebody asked for it.
    """

    def __init__(self, client: QmpClient, process: QemuProcess) -> None:
        self._client = client
        self._process = process
        self._expected = False
        self._ended = False
        self._fault = ""
        self._reading = True
        self._epoll = select.epoll()
        self._epoll.register(client, select.EPOLLIN)
        self._epoll.register(process, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def add_source(self, source: DriverWatch) -> None:
        """Make `fileno` readable while `source` is; whoever takes from it does so beside `take`."""
        self._epoll.register(source, select.EPOLLIN)

    def expect_end(self) -> None:
        """Take the end of the process as asked for. Any thread may call it."""
        self._expected = True

    def take(self) -> list[EngineEvent]:
        """Return what happened since the last call, in order; never blocks."""
        if self._ended:
            return []
        # First ask whether it ended, then read: whatever it said before its end is in the socket by now.
        ended = self._process.has_ended()
        told = self._read()
        while ended and (more := self._read()):
            told += more
        events = [event for event in map(translate, told) if event is not None]
        if ended:
            self._ended = True
            self._epoll.unregister(self._process)
            if not self._expected:
                events.append(Exited(self._fault or self._process.ending()))
        return events

    def close(self) -> None:
        """Release the epoll. Idempotent."""
        self._ended = True
        self._epoll.close()

    def _read(self) -> list[Event]:
        if not self._reading:
            return []
        try:
            told = self._client.poll_events()
            if any(event.name == "STOP" for event in told):
                self._client.post("query-status")  # the event does not say why
            for answer in self._client.take_answers():
                self._judge(answer)
            return told
        except EngineError as error:
            self._reading = False
            self._epoll.unregister(self._client)
            if not isinstance(error, MachineGone):
                self._process.kill()  # it speaks no QMP: a QEMU that cannot be watched must not go on
            return []

    def _judge(self, answer: Any) -> None:
        """End a guest that QEMU has stopped because it cannot go on with it; any other stop was asked for."""
        if isinstance(answer, dict) and answer.get("status") == _CANNOT_GO_ON:
            words = self._process.complaint().partition("\n")[0]
            self._fault = f"QEMU cannot go on with the guest: {words or _CANNOT_GO_ON}"
            self._process.kill()
