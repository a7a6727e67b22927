"""A guest that goes on elsewhere before all of its memory is there: QEMU's postcopy, both sides of it.

QEMU's stream then goes both ways: memory in one, what is asked for in the other; `pump.py` carries it. Each
side sends one mark: the receiver's says that its machine could run, the sender's answer that it has let go of
the images.

A sender's guest is stopped by us before QEMU is told to switch. So QEMU, which lets a guest run again that it
stopped for a migration that then failed, has none to let run.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from cloudvmm.engine.base import (
    EngineTimeout,
    LinkLost,
    MachineGone,
    NotSupportedYet,
    OnTransferred,
    ReceivedFrom,
    SentTo,
    Transferred,
)
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.migration import (
    ENDED,
    NotSent,
    await_end,
    begin_migration,
    refusal_of,
)
from cloudvmm.engine.qemu.migration_watch import SILENCE_S, limit_for, told
from cloudvmm.engine.qemu.process import ChildProcess
from cloudvmm.engine.qemu.pump import Pump
from cloudvmm.engine.qemu.qmp import QmpClient, QmpError
from cloudvmm.engine.qemu.spare import Spares
from cloudvmm.host import userfault

_FD_NAME: Final = "link"
_SLICE_S: Final = 0.1
_LOOK_S: Final = 0.05
_NEAR_S: Final = 0.005  # the guest stands still meanwhile
_REPORT_S: Final = 0.2
_ANSWER_S: Final = 1.0
_PAUSE_S: Final = 30.0
# An older one leaves behind what an emulated guest writes, and tries memory that cannot be told of.
_FIRST_VERSION: Final = (9, 0, 0)
_FIRST_PASS: Final = 2  # QEMU counts from 1, when it begins
_BROKEN: Final = ("postcopy-paused", "failed")
# What QEMU's receiver says last: kind, length, and no error.
_HAS_ALL: Final = b"\0\1\0\4\0\0\0\0"
_CAPABILITIES: Final = {"events": True, "postcopy-ram": True, "x-ignore-shared": False}


def check_postcopy(facts: QemuFacts, *, is_receiver: bool) -> None:
    """:raises NotSupportedYet: this QEMU is too old, or this process may not have userfaultfd."""
    if facts.version < _FIRST_VERSION:
        raise NotSupportedYet(
            f"Postcopy needs QEMU 9.0 or later, and this is QEMU {facts.version_text}:"
            " migrate with memory_mode Precopy"
        )
    if is_receiver and (reason := userfault.refusal()) is not None:
        raise NotSupportedYet(
            "Postcopy needs userfaultfd, which the kernel refuses: set vm.unprivileged_userfaultfd to 1,"
            " or let this user open /dev/userfaultfd"
        ) from reason


def check_memories(memories: Iterable[RamBacking]) -> None:
    """:raises NotSupportedYet: one is in a file, whose pages the kernel tells nobody of."""
    for memory in memories:
        if memory.ram.file is not None:
            raise NotSupportedYet(
                f"The memory zone {memory.ram.zone_id} has a file, which cannot be filled page by page:"
                " migrate with memory_mode Precopy"
            )


class PostcopyCarrier:
    """One side of a postcopy, of the QEMU that `process` is. `control` is lent, and `urgent` owned.

    A receiver needs `urgent`. For one thread.
    """

    def __init__(
        self, control: QmpClient, process: ChildProcess, urgent: QmpClient | None, *, is_sender: bool
    ) -> None:
        self._control = control
        self._process = process
        self._spares = None if urgent is None else Spares(urgent)
        self.is_sender = is_sender
        self._pump: Pump | None = None
        self._carried_bytes = 0  # over links that are lost
        self._on_transferred: OnTransferred = lambda _: None

    def send(self, target: SentTo, *, stop: Callable[[], None], unlock: Callable[[], None]) -> float:
        """Blocking. Go over the memory once, `stop` the guest, switch; `unlock` when the other side is ready.

        Return since when, on the monotonic clock, the guest stands still. What is left is sent meanwhile, and
        `transfer_rest` waits for that.

        :raises NotSent: QEMU refused, or failed. :raises LinkLost: the other side is gone.
        """
        self._on_transferred = target.on_transferred
        downtime_ms = limit_for(target.downtime_ms)
        pump = self._begin("migrate", target.link_fd, downtime_ms=downtime_ms)
        info = self._go_over_once(pump, target.insist_s)
        if info.get("status") == "completed":  # there was nothing left
            downtime_ms = int(info.get("downtime", 0))
            stopped_s = time.monotonic() - downtime_ms / 1000
        else:
            stop()
            stopped_s = time.monotonic()
            self._control.execute("migrate-start-postcopy")
        self._await_mark(pump)
        unlock()
        pump.mark()
        return stopped_s

    def receive(self, source: ReceivedFrom, *, lock: Callable[[], None]) -> None:
        """Blocking. Have QEMU take as much as its guest needs to run; `lock` then, and say so.

        :raises StateError: it is no state of such a machine. :raises LinkLost: the other side is gone.
        """
        self._on_transferred = source.on_transferred
        if self._spares is not None:
            self._spares.lay()
        pump = self._begin("migrate-incoming", source.link_fd)
        try:
            while self._look(pump).get("status") not in ("postcopy-active", *ENDED):
                with contextlib.suppress(EngineTimeout):
                    self._control.wait_event("MIGRATION", timeout_s=_REPORT_S)
            while self._is_loading():
                pump.wait_end(timeout_s=_NEAR_S)
                self._check_alive()
        except MachineGone as error:
            raise refusal_of(self._process) from error
        pump.mark()
        self._await_mark(pump)
        lock()

    def transfer_rest(self, link_fd: int | None) -> None:
        """Blocking until the receiver has all of the memory; over another link where there is one.

        :raises LinkLost: the other side is gone; another link may be tried.
        """
        if link_fd is not None:
            self._go_on_over(link_fd)
        assert self._pump is not None
        try:
            while not self._pump.wait_end(timeout_s=_REPORT_S):
                self._check_going(self._look(self._pump))
                if self._spares is not None:
                    self._spares.forget_events()
            self._check_going(await_end(self._control))
        except (LinkLost, EngineTimeout) as error:
            self._carried_bytes += self._pump.carried_bytes
            self._pump.close()
            raise LinkLost("The connection is lost while memory is on the way") from error
        self.close()

    def take_back(self) -> None:
        """Blocking. Have QEMU come to an end with a guest that the other side does not go on with; closes.

        QEMU calls nothing off once it has switched. It ends well if it is told that the other side has it
        all; what it sends until then is dropped.
        """
        pump = self._pump
        if pump is None:
            return
        try:
            self._control.execute("migrate_cancel")
        except QmpError:
            pump.play_receiver(_HAS_ALL, check=self._check_alive)
        pump.close()
        await_end(self._control)

    def close(self) -> None:
        if self._pump is not None:
            self._pump.close()
        if self._spares is not None:
            self._spares.close()

    def _begin(self, command: str, link_fd: int, *, downtime_ms: int | None = None) -> Pump:
        near, far = socket.socketpair()
        try:
            with far:
                begin_migration(self._control, command, far, _CAPABILITIES, downtime_ms=downtime_ms)
        except BaseException:
            near.close()
            raise
        self._pump = Pump(near, link_fd, has_marks=True, expects=not self.is_sender)
        return self._pump

    def _go_over_once(self, pump: Pump, limit_s: int | None) -> dict[str, Any]:
        """Wait until QEMU has been over the memory, or for `limit_s` seconds; return what it says then."""
        started_s = time.monotonic()
        while True:
            info = self._look(pump)
            if info.get("status") in ("failed", "cancelled"):
                raise NotSent(info.get("error-desc", "The migration failed"))
            is_over = info.get("ram", {}).get("dirty-sync-count", 0) >= _FIRST_PASS
            is_late = limit_s is not None and time.monotonic() - started_s >= limit_s
            if is_over or is_late or info.get("status") == "completed":
                return info
            pump.wait_end(timeout_s=_LOOK_S)

    def _await_mark(self, pump: Pump) -> None:
        deadline_s = time.monotonic() + SILENCE_S
        while not pump.wait_mark(timeout_s=_SLICE_S):
            self._check_alive()
            if time.monotonic() > deadline_s:
                raise EngineTimeout(f"The other side did nothing for {SILENCE_S:g} s")

    def _is_loading(self) -> bool:
        try:
            status: str = self._control.execute("query-status", timeout_s=_ANSWER_S)["status"]
        except EngineTimeout:
            return True
        return status == "inmigrate"

    def _look(self, pump: Pump) -> dict[str, Any]:
        """Tell how far it is, and return what QEMU says; nothing where it is too busy, as with what comes."""
        pump.wait_end(timeout_s=0)  # raises what it came to
        info: dict[str, Any] = {}
        with contextlib.suppress(EngineTimeout):
            info = self._control.execute("query-migrate", timeout_s=_ANSWER_S)
        carried_bytes = self._carried_bytes + pump.carried_bytes
        if self.is_sender:
            self._on_transferred(told(info, carried_bytes))
        else:
            self._on_transferred(Transferred(bytes=carried_bytes))
        return info

    def _check_going(self, info: dict[str, Any]) -> None:
        self._check_alive()
        if info.get("status") in _BROKEN:
            raise LinkLost(info.get("error-desc", "QEMU has lost the connection"))

    def _check_alive(self) -> None:
        if self._process.has_ended():
            raise MachineGone("QEMU ended while its memory was on the way")

    def _go_on_over(self, link_fd: int) -> None:
        """:raises LinkLost: QEMU does not take it."""
        near = self._resume() if self._spares is None else self._spares.take(self._check_alive)
        self._pump = Pump(near, link_fd, has_marks=False, expects=not self.is_sender)

    def _resume(self) -> socket.socket:
        """Have a QEMU that sends go on; return our end of its way, which is the caller's."""
        near, far = socket.socketpair()
        try:
            with far:
                self._await_pause()
                self._control.execute("getfd", {"fdname": _FD_NAME}, fds=[far.fileno()])
                self._control.execute("migrate", {"uri": f"fd:{_FD_NAME}", "resume": True})
        except (EngineTimeout, QmpError) as error:
            near.close()
            raise LinkLost("QEMU does not go on") from error
        except BaseException:
            near.close()
            raise
        return near

    def _await_pause(self) -> None:
        """Wait until QEMU has seen that its link is gone."""
        deadline_s = time.monotonic() + _PAUSE_S
        while self._control.execute("query-migrate")["status"] != "postcopy-paused":
            with contextlib.suppress(EngineTimeout):
                self._control.wait_event("MIGRATION", timeout_s=_LOOK_S)
            if time.monotonic() > deadline_s:
                raise EngineTimeout("QEMU does not see that the connection is gone")
