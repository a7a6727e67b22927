"""The engine that makes machines in memory."""

from __future__ import annotations

import threading

from cloudvmm import __version__
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import EngineInfo, MachineGone, MachineSpec, Reach
from cloudvmm.engine.fake.check import check_devices, check_slots
from cloudvmm.engine.fake.fault import Faults, strike
from cloudvmm.engine.fake.hardware import Hardware
from cloudvmm.engine.fake.lifeline import Lifeline
from cloudvmm.engine.fake.machine import FakeMachine
from cloudvmm.engine.fake.state import find_state


class FakeEngine:
    """Runs no guest and needs nothing of the host.

    Every blocking operation takes `latency_s`; `faults` may be filled before and at any time later.
    With `guest_honours_power_button` guests switch themselves off when the power button is pressed.
    """

    outlives_manager = False

    def __init__(
        self,
        latency_s: float = 0.0,
        faults: Faults | None = None,
        *,
        guest_honours_power_button: bool = False,
    ) -> None:
        self.faults = Faults() if faults is None else faults
        self._latency_s = latency_s
        self._guest_honours_power_button = guest_honours_power_button
        self._lock = threading.Lock()
        self._builds: set[Lifeline] = set()
        self._last_machine: FakeMachine | None = None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            name="fake",
            version=__version__,
            accelerator="none",
            accelerator_reason="The fake engine runs no guest",
            first_slot=1,
            last_slot=31,
            max_vcpus=254,
        )

    @property
    def last_machine(self) -> FakeMachine | None:
        """The machine built last, for whoever plays its guest in the same process."""
        return self._last_machine

    def build(self, spec: MachineSpec) -> FakeMachine:
        """Blocking. Check what a real engine would need and make a machine in memory.

        :raises SlotError: two devices want one slot, or a slot is out of range.
        :raises DeviceError: a disk image, a pmem file or a console cannot be opened as wanted.
        :raises StateError: the state that `spec.origin` gives is not that of such a machine.
        :raises LinkLost: the other side of a migration is gone.
        :raises MachineGone: `abort_build` was called, or a fault killed the machine.
        """
        lifeline = Lifeline()
        with self._lock:
            self._builds.add(lifeline)
        try:
            return self._build(spec, lifeline)
        finally:
            with self._lock:
                self._builds.discard(lifeline)

    def adopt(self, _state_dir: str) -> None:
        """Find nothing: a machine in memory ends with its process."""

    def discard(self, _state_dir: str) -> None:
        """Nothing to end, for the same reason."""

    def check_postcopy(self, *, is_receiver: bool) -> None:
        """Refuse where a fault does; the fake has all that it takes."""
        lifeline = Lifeline()
        strike(self.faults.take("check_postcopy"), lifeline, die=lambda _reason: lifeline.cut())

    def reach(self, _vm_config: VmConfig) -> Reach:
        """Nothing: it opens what the configuration names, and that alone."""
        return Reach()

    def another(self) -> FakeEngine:
        """Return an engine with the same faults."""
        return FakeEngine(
            self._latency_s,
            self.faults,
            guest_honours_power_button=self._guest_honours_power_button,
        )

    def abort_build(self) -> None:
        with self._lock:
            for lifeline in self._builds:
                lifeline.cut()

    def _build(self, spec: MachineSpec, lifeline: Lifeline) -> FakeMachine:
        lifeline.wait(self._latency_s)
        strike(self.faults.take("build"), lifeline, die=lambda _reason: lifeline.cut())
        check_slots(spec.slots, self.info)
        image_types = check_devices(spec.vm_config)
        state = find_state(spec, lifeline)
        machine = FakeMachine(
            spec,
            Hardware(spec, self.info, image_types),
            self.faults,
            state=state,
            latency_s=self._latency_s,
            guest_honours_power_button=self._guest_honours_power_button,
        )
        if lifeline.is_cut:
            machine.close()
            raise MachineGone("The machine is gone")
        self._last_machine = machine
        return machine
