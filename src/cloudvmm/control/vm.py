"""The VM object: what exists from boot until shutdown. Owned by the control loop."""

from __future__ import annotations

from cloudvmm.api.data import DeviceTree, VmState
from cloudvmm.config.memory import DEFAULT_ZONE_ID
from cloudvmm.config.number import U64_MAX
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.lifecycle import check_transition
from cloudvmm.control.numbering import Numbering
from cloudvmm.control.progress import RAM, Part, Progress
from cloudvmm.control.ram import GuestRam, Vcpus, ram_of
from cloudvmm.control.tree import bdf_of, device_tree
from cloudvmm.engine.base import DriverChanged, Machine, PciBar


class Vm:
    """A machine and what the loop knows about it. `tree` and `guest_ram` are replaced, never changed.

    `vcpus` and `ram` are what the machine was last told, `guest_vcpus` and `guest_ram` what its guest made of
    it.
    `is_ending` once it is on its way out. `is_held` is whether a debugger has stopped it, None where none has
    done anything yet.
    `unreported` is what its drivers did before it was told that the VM has booted.
    """

    def __init__(self, machine: Machine, numbering: Numbering, vm_config: VmConfig) -> None:
        self.machine = machine
        self.numbering = numbering
        self.state = VmState.CREATED
        self.is_ending = False
        self.exit_reason: str | None = None
        self.is_held: bool | None = None
        self.unreported: list[DriverChanged] = []
        self.vcpus = Vcpus(vm_config.cpus.boot_vcpus)
        self.ram = ram_of(vm_config.memory)
        self.guest_ram = GuestRam()
        self.guest_vcpus = vm_config.cpus.boot_vcpus
        self.progress = Progress()
        self._taken_modules: set[int] = set()
        self._zones = {zone.id: zone.size for zone in vm_config.memory.zones or ()}
        self._legacy_config = vm_config  # its serial port and debug console stay as they are
        self._bars: dict[str, list[PciBar]] = {}
        self.tree: DeviceTree = {}
        self.renew_tree()

    def check(self, target: VmState) -> None:
        """:raises InvalidStateTransition: `target` may not follow the present state."""
        check_transition(self.state, target)

    def place_bars(self, bars: dict[str, list[PciBar]]) -> None:
        if bars != self._bars:
            self._bars = bars
            self.renew_tree()

    def renew_tree(self) -> None:
        """Describe the devices anew: one came or went."""
        self.tree = device_tree(self._legacy_config, self.numbering, self._bars)

    def drop_device(self, device_id: str) -> str | None:
        """The guest has let go of a device: return the address that is free now, None where it has none."""
        slot = self.numbering.release(device_id)
        if slot is None:
            return None
        self._bars = {known: bars for known, bars in self._bars.items() if known != device_id}
        self.renew_tree()
        return bdf_of(slot)

    def note_balloon(self, actual_bytes: int) -> None:
        """The guest has `actual_bytes` left of what booted and of the modules plugged since."""
        balloon_bytes = max(0, self.ram.current_bytes - actual_bytes)
        self.guest_ram = GuestRam(balloon_bytes, self.guest_ram.plugged)

    def note_zone(self, zone_id: str, plugged_bytes: int) -> None:
        self.guest_ram = self.guest_ram.with_zone(zone_id, plugged_bytes)

    def note_module(self, number: int) -> None:
        """The guest has taken up a memory module."""
        self._taken_modules.add(number)

    @property
    def guest_ram_bytes(self) -> int:
        """RAM of the boot, and what the guest has taken up since, of modules or by virtio-mem."""
        modules = enumerate(self.ram.modules)
        taken_bytes = sum(size for number, size in modules if number in self._taken_modules)
        return self.ram.boot_bytes + taken_bytes + self.guest_ram.plugged.get(DEFAULT_ZONE_ID, 0)

    def sized_by_zone(self, zone_id: str) -> tuple[Part, int]:
        """Return what the virtio-mem device of a zone makes larger, and the size that the guest has of it."""
        if zone_id not in self._zones:
            return RAM, self.guest_ram_bytes
        return Part("zone", zone_id), self._zones[zone_id] + self.guest_ram.plugged.get(zone_id, 0)


def configured_ram_bytes(vm_config: VmConfig) -> int:
    """Return the RAM that is configured: `memory.size` and all zones, what virtio-mem gives not counted.

    As in the reference the sum of what cannot be booted anyway stays within 64 bits, by losing the rest.
    """
    return (vm_config.memory.size + sum(zone.size for zone in vm_config.memory.zones or [])) & U64_MAX
