"""A machine in memory that keeps the contract of `engine.base.Machine`, with a guest that others play."""

from __future__ import annotations

import contextlib
import copy
import enum
import threading
from typing import Final

from cloudvmm.config.disk import ImageType
from cloudvmm.config.pci import PciDevice
from cloudvmm.engine.base import (
    DeviceError,
    EngineError,
    EngineEvent,
    Exited,
    MachineGone,
    MachineSpec,
    NotSupportedYet,
    PciBar,
    PciChanged,
    PoweredOff,
    ResetRequested,
)
from cloudvmm.engine.fake.check import check_payload
from cloudvmm.engine.fake.console import Console
from cloudvmm.engine.fake.core import write_core
from cloudvmm.engine.fake.counter import device_counters
from cloudvmm.engine.fake.fault import Faults, strike
from cloudvmm.engine.fake.guest import FakeGuest
from cloudvmm.engine.fake.lifeline import Lifeline
from cloudvmm.host.eventfd import EventFd

BAR_BASE: Final = 0x3800_0000_0000
BAR_BYTES: Final = 512 * 1024


class Phase(enum.Enum):
    BUILT = "built"
    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"  # switched off, or waiting to be built anew
    GONE = "gone"


# Where an operation is allowed; GONE allows none.
ALLOWED: Final = {
    "boot": {Phase.BUILT},
    "pause": {Phase.RUNNING},
    "resume": {Phase.PAUSED},
    "coredump": {Phase.PAUSED},
    "power_button": {Phase.BUILT, Phase.RUNNING, Phase.PAUSED, Phase.HALTED},
    "nmi": {Phase.BUILT, Phase.RUNNING, Phase.PAUSED, Phase.HALTED},
    "counters": {Phase.BUILT, Phase.RUNNING, Phase.PAUSED, Phase.HALTED},
    "pci_resources": {Phase.BUILT, Phase.RUNNING, Phase.PAUSED, Phase.HALTED},
}


class FakeMachine:
    """Made by `FakeEngine.build`; threads as in `engine.base`. `guest` is what plays the guest."""

    def __init__(
        self, spec: MachineSpec, faults: Faults, *, latency_s: float, guest_honours_power_button: bool
    ) -> None:
        """Open the consoles of `spec`; its files and slots are checked already.

        :raises DeviceError: a console cannot be had.
        """
        self._vm_config = copy.deepcopy(spec.vm_config)  # the spec's stays control's
        self._slots = dict(spec.slots)
        self._faults = faults
        self._latency_s = latency_s
        self._lock = threading.RLock()
        self._lifeline = Lifeline()
        self._phase = Phase.BUILT
        self._was_booted = False
        self._is_closed = False
        self._events: list[EngineEvent] = []
        self.guest = FakeGuest(self._hear, self._lock, honours_power_button=guest_honours_power_button)
        self._event_fd = EventFd()
        try:
            self._console = Console(spec.serial, spec.console, spec.debug_console)
        except DeviceError:
            self._event_fd.close()
            raise

    @property
    def image_types(self) -> dict[str, ImageType]:
        """Nothing: images are opened, not looked into."""
        return {}

    @property
    def process_id(self) -> int | None:
        """None: the fake has no process of its own."""
        return None

    @property
    def phase(self) -> Phase:
        return self._phase

    def fileno(self) -> int:
        return self._event_fd.fileno()

    def take_events(self) -> list[EngineEvent]:
        with self._lock:
            if self._is_closed:
                return []
            self._event_fd.read()
            events, self._events = self._events, []
            return events

    def boot(self) -> None:
        self._begin("boot")
        check_payload(self._vm_config)
        with self._lock:
            self._check("boot")
            self._was_booted = True
            self._phase = Phase.RUNNING
            self._console.start()
            self._report(PciChanged())
            self.guest.wake()

    def pause(self) -> None:
        self._begin("pause")
        with self._lock:
            self._check("pause")
            self._stand_still(Phase.PAUSED)

    def resume(self) -> None:
        self._begin("resume")
        with self._lock:
            self._check("resume")
            self._phase = Phase.RUNNING
            self._console.set_awake(True)
            self.guest.wake()

    def power_button(self) -> None:
        self._press("power_button")

    def nmi(self) -> None:
        self._press("nmi")

    def coredump(self, fd: int) -> None:
        self._begin("coredump")
        memory = self._vm_config.memory
        ram_bytes = memory.size + sum(zone.size for zone in memory.zones or ())
        try:
            write_core(fd, vcpus=self._vm_config.cpus.boot_vcpus, ram_bytes=ram_bytes)
        except OSError as error:
            raise EngineError("The core cannot be written") from error

    def add_device(self, device: PciDevice, slot: int) -> None:
        raise NotSupportedYet("Adding a device to a booted VM comes with a later release")

    def remove_device(self, device_id: str) -> None:
        raise NotSupportedYet("Removing a device from a booted VM comes with a later release")

    def resize_vcpus(self, vcpus: int) -> None:
        raise NotSupportedYet("Resizing a booted VM comes with a later release")

    def add_memory(self, size_bytes: int) -> None:
        raise NotSupportedYet("Resizing a booted VM comes with a later release")

    def request_zone_size(self, zone_id: str, plugged_bytes: int) -> None:
        raise NotSupportedYet("Resizing a booted VM comes with a later release")

    def resize_balloon(self, balloon_bytes: int) -> None:
        raise NotSupportedYet("Resizing a booted VM comes with a later release")

    def resize_disk(self, disk_id: str, size_bytes: int) -> None:
        raise NotSupportedYet("Resizing a booted VM comes with a later release")

    def save(self, folder: str) -> None:
        raise NotSupportedYet("Snapshots come with a later release")

    def send(self, link_fd: int) -> None:
        raise NotSupportedYet("Live migration comes with a later release")

    def counters(self) -> dict[str, dict[str, int]]:
        self._begin("counters")
        return device_counters(self._vm_config, self.guest.tick)

    def pci_resources(self) -> dict[str, list[PciBar]]:
        """Give one BAR per device, placed by its slot alone; none before the guest booted."""
        self._begin("pci_resources")
        if not self._was_booted:
            return {device_id: [] for device_id in self._slots}
        return {device_id: [_bar(slot)] for device_id, slot in self._slots.items()}

    def kill(self) -> None:
        with self._lock:
            if self._phase is not Phase.GONE:
                self._stand_still(Phase.GONE)
                self._console.stop()
            self._lifeline.cut()

    def die(self, reason: str = "The machine died") -> None:
        """End as a process that crashes: `Exited(reason)` is the last event. For tests, from any thread."""
        with self._lock:
            if self._phase is not Phase.GONE:
                self._report(Exited(reason))
                self.kill()

    def close(self) -> None:
        if self._is_closed:
            return
        with contextlib.suppress(MachineGone):  # killed while it was asked to end
            strike(self._faults.take("close"), self._lifeline, die=self.die)
        self.kill()
        self._console.close()
        with self._lock:
            self._is_closed = True
            self._event_fd.close()

    def _begin(self, operation: str) -> None:
        """Check, take the time that the operation takes, let a fault strike, check again."""
        self._check(operation)
        self._lifeline.wait(self._latency_s)
        strike(self._faults.take(operation), self._lifeline, die=self.die)
        self._check(operation)

    def _check(self, operation: str) -> None:
        self._lifeline.wait(0)
        if self._phase not in ALLOWED[operation]:
            raise EngineError(f"The machine is {self._phase.value}: {operation} is not possible")

    def _press(self, what: str) -> None:
        self._begin(what)
        with self._lock:
            self._check(what)
            self.guest.notice(what)

    def _stand_still(self, phase: Phase) -> None:
        self.guest.sleep()
        self._phase = phase
        self._console.set_awake(False)

    def _hear(self, event: EngineEvent) -> None:
        """Take what the guest does.

        :raises EngineError: the guest does not run.
        """
        with self._lock:
            if self._phase is not Phase.RUNNING:
                raise EngineError(f"The guest does not run: the machine is {self._phase.value}")
            if isinstance(event, PoweredOff | ResetRequested):
                self._stand_still(Phase.HALTED)
            self._report(event)

    def _report(self, event: EngineEvent) -> None:
        self._events.append(event)
        self._event_fd.write()


def _bar(slot: int) -> PciBar:
    base = BAR_BASE + slot * BAR_BYTES
    return PciBar(index=0, base=base, size=BAR_BYTES, kind="Mmio64", prefetchable=False)
