"""A machine in memory that keeps the contract of `engine.base.Machine`, with a guest that others play."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Final

from cloudvmm.config.disk import ImageType
from cloudvmm.config.pci import PciDevice
from cloudvmm.engine.base import (
    BalloonChanged,
    Base,
    DeviceError,
    DeviceRemoved,
    EngineError,
    EngineEvent,
    Exited,
    FrozenDisk,
    MachineGone,
    MachineSpec,
    MemoryPassSent,
    ModuleTaken,
    NotForkable,
    OnSaved,
    PciBar,
    PciChanged,
    PoweredOff,
    ResetRequested,
    Saved,
    SentTo,
    VcpusChanged,
    VcpusRemoved,
    ZoneChanged,
    drop_saved,
)
from cloudvmm.engine.fake.check import check_payload
from cloudvmm.engine.fake.console import Console
from cloudvmm.engine.fake.core import write_core
from cloudvmm.engine.fake.driver import FakeDrivers, driven_ids, has_driver
from cloudvmm.engine.fake.fault import Faults, strike
from cloudvmm.engine.fake.guest import FakeGuest
from cloudvmm.engine.fake.hardware import Hardware
from cloudvmm.engine.fake.lifeline import Lifeline
from cloudvmm.engine.fake.phase import ALLOWED, Phase
from cloudvmm.engine.fake.state import (
    FakeBase,
    GuestState,
    frozen_disk,
    overlay_on,
    paths_of,
    save_state,
    send_disk,
    send_state,
)
from cloudvmm.host.eventfd import EventFd

BAR_BASE: Final = 0x3800_0000_0000
BAR_BYTES: Final = 512 * 1024


class FakeMachine:
    """Made by `FakeEngine.build`; threads as in `engine.base`. `guest` is what plays the guest."""

    def __init__(
        self,
        spec: MachineSpec,
        hardware: Hardware,
        faults: Faults,
        *,
        latency_s: float,
        guest_honours_power_button: bool,
        state: GuestState | None = None,
    ) -> None:
        """Open the consoles of `spec`; its files and slots are checked already. `state` is where it goes on.

        :raises DeviceError: a console cannot be had.
        """
        self._hardware = hardware
        self._faults = faults
        self._latency_s = latency_s
        self._lock = threading.RLock()
        self._lifeline = Lifeline()
        self._phase = Phase.BUILT
        self._was_booted = False
        self._was_sent = self._is_elsewhere = False
        self._is_to_start = False
        self._is_closed = False
        self._events: list[EngineEvent] = []
        self._driven_ids = driven_ids(spec)
        self.drivers = FakeDrivers(self._hear, spec.vm_config)
        self.guest = FakeGuest(self._hear, self._lock, honours_power_button=guest_honours_power_button)
        self._event_fd = EventFd()
        try:
            self._console = Console(spec.serial, spec.console, spec.debug_console)
        except DeviceError:
            self._event_fd.close()
            raise
        if state is not None:
            self._go_on_from(state)

    @property
    def image_types(self) -> dict[str, ImageType]:
        """What each image was found to be."""
        return self._hardware.image_types

    @property
    def unsettled_slots(self) -> frozenset[int]:
        """None: the guest ejects what it was asked for alone."""
        return frozenset()

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
        check_payload(self._hardware.vm_config)
        with self._lock:
            self._check("boot")
            self._was_booted = True
            self._is_to_start = True
            self._phase = Phase.PAUSED
            if not self._hardware.vm_config.gdb:
                self._let_run()

    def pause(self) -> None:
        self._begin("pause")
        with self._lock:
            self._check("pause")
            self._stand_still(Phase.PAUSED)

    def resume(self) -> None:
        self._begin("resume")
        if self._is_elsewhere:
            raise EngineError("The guest has gone on in another machine")
        with self._lock:
            self._check("resume")
            self._console.set_awake(True)
            self._let_run()

    def power_button(self) -> None:
        self._press("power_button")

    def nmi(self) -> None:
        self._press("nmi")

    def coredump(self, fd: int) -> None:
        self._begin("coredump")
        hardware = self._hardware
        try:
            write_core(fd, vcpus=hardware.vcpus, ram_bytes=hardware.ram_bytes)
        except OSError as error:
            raise EngineError("The core cannot be written") from error

    def add_device(self, device: PciDevice, slot: int) -> None:
        with self._changing("add_device"):
            self._hardware.plug(device, slot, tick_ms=self.guest.tick)
            self._report(PciChanged())
            self.drivers.know(device)
            if has_driver(device) and device.id is not None:
                self.guest.ask("driver", device.id, partial(self.drivers.bind, device.id))

    def remove_device(self, device_id: str) -> None:
        with self._changing("remove_device"):
            self._hardware.check_known(device_id)
            self._ask_removal(device_id)

    def resize_vcpus(self, vcpus: int) -> None:
        with self._changing("resize_vcpus"):
            self._hardware.want_vcpus(vcpus)
            if self._hardware.leaving_to is not None:
                self._ask_vcpus(vcpus)
            else:
                self._report(VcpusChanged(vcpus))

    def add_memory(self, size_bytes: int) -> None:
        with self._changing("add_memory"):
            self._hardware.ram_bytes += size_bytes
            self._report(ModuleTaken(self._hardware.modules))
            self._hardware.modules += 1

    def request_zone_size(self, zone_id: str, plugged_bytes: int) -> None:
        with self._changing("request_zone_size"):
            self._hardware.check_zone(zone_id)
            self._ask_zone(zone_id, plugged_bytes)

    def resize_balloon(self, balloon_bytes: int) -> None:
        with self._changing("resize_balloon"):
            self._hardware.check_balloon()
            self._ask_balloon(balloon_bytes)

    def resize_disk(self, disk_id: str, size_bytes: int) -> None:
        with self._changing("resize_disk"):
            self._hardware.resize_disk(disk_id, size_bytes)

    def save(self, folder: str, on_saved: OnSaved = drop_saved) -> None:
        total_bytes = self._hardware.ram_bytes
        on_saved(Saved(0, total_bytes))
        self._begin("save")
        on_saved(Saved(total_bytes, total_bytes))
        save_state(self._state(), folder)

    def frozen_disks(self, disk_ids: Iterable[str]) -> dict[str, FrozenDisk]:
        return {disk_id: frozen_disk(*self._image_of(disk_id)) for disk_id in disk_ids}

    def freeze_disks(self, overlays: Mapping[str, str]) -> None:
        with self._changing("freeze_disks"):
            self._freeze(overlays)

    def fork(self, overlays: Mapping[str, str]) -> FakeBase:
        self._begin("fork")
        with self._lock:
            self._check("fork")
            disks = self._hardware.written_disks()
            if disks.keys() != overlays.keys():
                raise NotForkable("The disks that can be written have changed meanwhile")
            self._freeze(overlays)
            return FakeBase(self._state(), disks)

    def take_back(self, base: Base) -> None:
        assert isinstance(base, FakeBase)
        with self._lock:
            for disk in self._hardware.written_disks().values():
                os.unlink(disk[0])
            self._hardware.stand_on(base.disks)

    def send(self, target: SentTo) -> float:
        self._check("send")
        for device_id, path in paths_of(self._hardware.vm_config, target.disk_fds).items():
            send_disk(path, target.disk_fds[device_id], self._lifeline)
        try:
            self._begin("send")
        finally:
            with self._lock:
                if self._phase is Phase.RUNNING:
                    self._stand_still(Phase.PAUSED)
        stopped_s = time.monotonic()
        self._report(MemoryPassSent(number=0))
        send_state(self._state(), target, self._lifeline)
        self._was_sent = True
        return stopped_s

    def transfer_rest(self, link_fd: int | None = None) -> None:
        """There is none: all of the guest is sent at once."""
        self._is_elsewhere = self._was_sent
        self._begin("transfer_rest")

    def counters(self) -> dict[str, dict[str, int]]:
        self._begin("counters")
        with self._lock:
            return self._hardware.counters(self.guest.tick, now_s=int(time.time()))

    def pci_resources(self) -> dict[str, list[PciBar]]:
        """Give one BAR per device, placed by its slot alone; none before the guest booted."""
        self._begin("pci_resources")
        slots = self._hardware.slots
        if not self._was_booted:
            return {device_id: [] for device_id in slots}
        return {device_id: [_bar(slot)] for device_id, slot in slots.items()}

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

    @contextlib.contextmanager
    def _changing(self, operation: str) -> Iterator[None]:
        """Begin `operation`, then hold the lock for what it changes."""
        self._begin(operation)
        with self._lock:
            self._check(operation)
            yield

    def _image_of(self, disk_id: str) -> tuple[str, ImageType]:
        image = self._hardware.written_disks().get(disk_id)
        if image is None:
            raise DeviceError(f"The disk {disk_id} cannot go on in an overlay")
        return image

    def _freeze(self, overlays: Mapping[str, str]) -> None:
        with contextlib.ExitStack() as undo:
            for disk_id, path in overlays.items():
                overlay_on(*self._image_of(disk_id), path)
                undo.callback(os.unlink, path)
            undo.pop_all()
        self._hardware.stand_on({disk_id: (path, ImageType.QCOW2) for disk_id, path in overlays.items()})

    # What the guest does when it is asked to, with the lock held.

    def _let_go(self, device_id: str) -> None:
        self._hardware.unplug(device_id)
        self._report(DeviceRemoved(device_id))
        self._report(PciChanged())

    def _drop_vcpus(self, vcpus: int) -> None:
        self._hardware.drop_vcpus(vcpus)
        self._report(VcpusChanged(vcpus))
        self._report(VcpusRemoved(vcpus))

    def _ask_removal(self, device_id: str) -> None:
        self.guest.ask("device", device_id, partial(self._let_go, device_id))

    def _ask_vcpus(self, vcpus: int) -> None:
        self.guest.ask("vcpus", "", partial(self._drop_vcpus, vcpus), amount=vcpus)

    def _ask_zone(self, zone_id: str, plugged_bytes: int) -> None:
        def follow() -> None:
            self._hardware.plugged[zone_id] = plugged_bytes
            self._report(ZoneChanged(zone_id, plugged_bytes))

        self.guest.ask("zone", zone_id, follow, amount=plugged_bytes)

    def _ask_balloon(self, balloon_bytes: int) -> None:
        def follow() -> None:
            self._hardware.balloon_bytes = min(balloon_bytes, self._hardware.ram_bytes)
            self._report(BalloonChanged(self._hardware.ram_bytes - self._hardware.balloon_bytes))

        self.guest.ask("balloon", "", follow, amount=balloon_bytes)

    def _ask_configured_ram(self) -> None:
        """A guest that boots follows what its config asks of it."""
        vm_config = self._hardware.vm_config
        if vm_config.balloon is not None and vm_config.balloon.size:
            self._ask_balloon(vm_config.balloon.size)
        memory = vm_config.memory
        wanted = {zone.id: zone.hotplugged_size for zone in memory.zones or ()}
        for zone_id in self._hardware.plugged:
            plugged_bytes = wanted.get(zone_id, memory.hotplugged_size)
            if plugged_bytes:
                self._ask_zone(zone_id, plugged_bytes)

    def _state(self) -> GuestState:
        with self._lock:
            tick_ms, seen, unseen = self.guest.memory()
            return GuestState(
                engine="fake",
                tick_ms=tick_ms,
                seen=seen,
                unseen=unseen,
                asked=self.guest.waiting(),
                active=self.drivers.active,
                kinds=self.drivers.kinds,
                hardware=self._hardware.state(),
            )

    def _go_on_from(self, state: GuestState) -> None:
        self._hardware.become(state.hardware)
        self.guest.remember(state.tick_ms, state.seen, state.unseen)
        self.drivers.keep(state.active, state.kinds)
        for kind, what, amount in state.asked:
            match kind:
                case "driver":
                    self.guest.ask("driver", what, partial(self.drivers.bind, what))
                case "device":
                    self._ask_removal(what)
                case "vcpus":
                    self._ask_vcpus(amount)
                case "zone":
                    self._ask_zone(what, amount)
                case "balloon":
                    self._ask_balloon(amount)
        self._was_booted = True
        self._phase = Phase.PAUSED
        self._console.start(is_fresh=False)
        self._report(PciChanged())
        for device_id in state.active:  # as a device that is restored in use is activated
            self._report(self.drivers.change(device_id, is_active=True))

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

    def _let_run(self) -> None:
        self._phase = Phase.RUNNING
        if self._is_to_start:
            self._console.start()
            self._report(PciChanged())
            for device_id in self._driven_ids:
                self.drivers.bind(device_id)
        self.guest.wake()
        if self._is_to_start:
            self._is_to_start = False
            self._ask_configured_ram()

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
        reset = self.drivers.forget(event.device_id) if isinstance(event, DeviceRemoved) else None
        if reset is not None:
            self._events.append(reset)
        self._events.append(event)
        self._event_fd.write()


def _bar(slot: int) -> PciBar:
    base = BAR_BASE + slot * BAR_BYTES
    return PciBar(index=0, base=base, size=BAR_BYTES, kind="Mmio64", prefetchable=False)
