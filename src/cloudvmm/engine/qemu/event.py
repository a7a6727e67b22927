"""From what QEMU tells unasked to the events of the seam.

`EventStream` belongs to the control loop: one descriptor to poll, and a take that never blocks.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from cloudvmm.engine.base import (
    BalloonChanged,
    DeviceRemoved,
    EngineError,
    EngineEvent,
    Exited,
    GuestPanicked,
    HelperEnded,
    MachineGone,
    MemoryPassSent,
    ModuleTaken,
    PciChanged,
    PoweredOff,
    RemovalRefused,
    ResetRequested,
    ResizeRefused,
    ZoneChanged,
)
from cloudvmm.engine.qemu.codec import Event, Refusal, Reply
from cloudvmm.engine.qemu.memory import module_number
from cloudvmm.engine.qemu.name import device_id
from cloudvmm.engine.qemu.parts import Command
from cloudvmm.engine.qemu.vcpu import QUERY, Vcpus, is_refusal

if TYPE_CHECKING:
    from cloudvmm.engine.qemu.companion import Companion
    from cloudvmm.engine.qemu.debugger import DebugWatch
    from cloudvmm.engine.qemu.driver import DriverWatch
    from cloudvmm.engine.qemu.process import ChildProcess
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
        case "MIGRATION_PASS":
            return MemoryPassSent(event.data["pass"] - 1)
        case "MEMORY_DEVICE_SIZE_CHANGE":
            name = device_id(event.data.get("id", ""))
            return None if name is None else ZoneChanged(name, event.data["size"])
        case "DEVICE_UNPLUG_GUEST_ERROR":
            name = _device_of(event)
            return None if name is None else RemovalRefused(name)
        case "ACPI_DEVICE_OST" if event.data["info"]["slot-type"] == "DIMM":
            return _translate_module(event)
        case "RESET" | "DEVICE_DELETED":
            return PciChanged()
        case _:
            return None


def _translate_module(event: Event) -> EngineEvent | None:
    if is_refusal(event):
        return ResizeRefused("modules")
    number = module_number(event.data["info"].get("device", ""))
    return None if number is None else ModuleTaken(number)


def _device_of(event: Event) -> str | None:
    """Return the id of the device of ours that `event` is about; parts of a device have none."""
    return device_id(event.data.get("device", ""))


def _translate_shutdown(reason: object) -> EngineEvent | None:
    if reason == "guest-reset":
        return ResetRequested()
    if reason in ("guest-shutdown", "guest-panic"):
        return PoweredOff()
    return None  # asked for from outside; the end of the process follows


class EventStream:
    """Owns an epoll over `client` (a monitor whose negotiation is done) and `process`; both are lent.

    When the guest has let go of a device, the commands that `remains_of` gives for it are posted on `client`,
    and `DeviceRemoved` comes once QEMU has carried them out: name and descriptors are free then.

    A helper that ends before its device and QEMU do is told of, and stays no zombie.

    `vcpus` hears how many are left after each event that may mean that one is gone.

    `debugger` tells which stops of the guest, and which ends of one, are those of a debugger.

    `expect_end` makes the end of the process no event: somebody asked for it.
    """

    def __init__(
        self,
        client: QmpClient,
        process: ChildProcess,
        *,
        remains_of: Callable[[str], list[Command] | None],
        vcpus: Vcpus,
        debugger: DebugWatch | None = None,
    ) -> None:
        self._client = client
        self._process = process
        self._remains_of = remains_of
        self._vcpus = vcpus
        self._debugger = debugger
        self._asked_why: dict[int, int] = {}  # the number of a question why the guest stopped, to the turn
        self._counting: set[int] = set()  # the numbers of the commands that ask for the places of vCPUs
        self._helpers: dict[str, Companion] = {}
        self._early: list[Event] = []
        self._heard_at = 0
        self._leaving: dict[int, str] = {}  # the number of the last command for a device to its id
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

    def preload(self, events: Iterable[Event]) -> None:
        """Hear `events`, which nobody has heard, at the next `take`, before what QEMU says then."""
        self._early += events

    @property
    def heard_at(self) -> int:
        """When the last event happened that was given, as QEMU has it."""
        return self._heard_at

    def watch_helper(self, device_id: str, helper: Companion) -> None:
        """Tell of the end of `helper`, which is lent, until `leave_helper`. Any thread may call it."""
        self._helpers[device_id] = helper
        with contextlib.suppress(OSError, ValueError):  # it is closed already
            self._epoll.register(helper, select.EPOLLIN)

    def leave_helper(self, device_id: str) -> None:
        """Tell nothing more of who serves a device; to be done before it is closed."""
        helper = self._helpers.pop(device_id, None)
        if helper is not None:
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(helper)

    def expect_end(self) -> None:
        """Take the end of the process as asked for. Any thread may call it."""
        self._expected = True

    def take(self) -> list[EngineEvent]:
        """Return what happened since the last call, in order; never blocks."""
        if self._ended:
            return []
        # First ask whether it ended, then read: whatever it said before its end is in the socket by now.
        ended = self._process.has_ended()
        helpless = [name for name, helper in tuple(self._helpers.items()) if helper.has_ended()]
        told = self._read()
        while ended and (more := self._read()):
            told += more
        events = told + self._tell_helpless(helpless, told)
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

    def _read(self) -> list[EngineEvent]:
        if not self._reading:
            return []
        try:
            return self._heard()
        except MachineGone:
            self._stop_reading()
        except EngineError:
            self._give_up()  # it speaks no QMP
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            self._fault = f"QEMU told of something without what belongs to it: {error!r}"
            self._give_up()
        return []

    def _give_up(self) -> None:
        """End it: a QEMU that cannot be watched must not go on."""
        self._stop_reading()
        self._process.kill()

    def _stop_reading(self) -> None:
        self._reading = False
        self._epoll.unregister(self._client)

    def _heard(self) -> list[EngineEvent]:
        early, self._early = self._early, []
        told = [*early, *self._client.poll_events()]
        self._heard_at = max([self._heard_at, *(event.at for event in told)])
        let_go = [event for each in told for event in self._hear_run_state(each)]
        tells_of_vcpus = [self._vcpus.is_told_by(event) for event in told]  # it hears each of them
        counted = self._count_vcpus() if any(tells_of_vcpus) else []
        refused = [ResizeRefused("vcpus") for event in told if self._vcpus.is_refused_by(event)]
        gone = [event for each in told if each.name == "DEVICE_DELETED" for event in self._clear(each)]
        gone += [event for answer in self._client.take_answers() for event in self._hear(answer)]
        plain = [event for event in map(translate, told) if event is not None]
        return [*plain, *counted, *refused, *let_go, *gone]

    def _hear_run_state(self, event: Event) -> list[EngineEvent]:
        if event.name == "STOP":
            number = self._client.post("query-status")  # the event does not say why
            if number is not None and self._debugger is not None:
                self._asked_why[number] = self._debugger.turn
        elif event.name == "RESUME" and self._debugger is not None:
            return self._debugger.hear_resume()
        return []

    def _count_vcpus(self) -> list[EngineEvent]:
        """Tell what became of the guest's vCPUs, at once if that is known, else when QEMU has answered."""
        if (places := self._vcpus.known_places) is not None:
            return [*self._vcpus.judge(places)]
        number = self._client.post(QUERY)
        if number is not None:
            self._counting.add(number)
        return []

    def _tell_helpless(self, device_ids: list[str], told: list[EngineEvent]) -> list[EngineEvent]:
        """Tell whose helpers ended, unless the device goes, or QEMU does: then they end as they should."""
        going = {event.device_id for event in told if isinstance(event, DeviceRemoved)}
        going.update(self._leaving.values())
        events: list[EngineEvent] = []
        for name in device_ids:
            reason = self._helpers[name].ending()
            self.leave_helper(name)
            if name not in going and self._reading and not self._expected:
                events.append(HelperEnded(name, reason))
        return events

    def _clear(self, event: Event) -> list[EngineEvent]:
        """Have taken away what a device leaves in QEMU; return what is to be told at once."""
        name = _device_of(event)
        commands = None if name is None else self._remains_of(name)
        if name is None or commands is None:
            return []
        if not commands:
            return [DeviceRemoved(name)]  # a guest can eject what nobody can ask it for
        numbers = [self._client.post(command.name, command.arguments) for command in commands]
        if numbers[-1] is None:
            return [DeviceRemoved(name)]  # QEMU hears nothing more
        self._leaving[numbers[-1]] = name
        return []

    def _hear(self, answer: Reply | Refusal) -> list[EngineEvent]:
        name = None if answer.command_id is None else self._leaving.pop(answer.command_id, None)
        if name is not None:
            return [DeviceRemoved(name)]
        if answer.command_id in self._counting:
            self._counting.discard(answer.command_id)
            return [*self._vcpus.judge(answer.value)] if isinstance(answer, Reply) else []
        turn = self._asked_why.pop(answer.command_id, None) if answer.command_id is not None else None
        if isinstance(answer, Reply):
            self._judge(answer.value)
            if turn is not None and self._debugger is not None:
                return self._debugger.judge_stop(answer.value["status"], turn)
        return []

    def _judge(self, answer: Any) -> None:
        """End a guest that QEMU has stopped because it cannot go on with it; any other stop was asked for."""
        if isinstance(answer, dict) and answer.get("status") == _CANNOT_GO_ON:
            words = self._process.complaint().partition("\n")[0]
            self._fault = f"QEMU cannot go on with the guest: {words or _CANNOT_GO_ON}"
            self._process.kill()
