"""The VM object: what exists from boot until shutdown. Owned by the control loop."""

from __future__ import annotations

from cloudvmm.api.data import DeviceTree, VmState
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.lifecycle import check_transition
from cloudvmm.control.numbering import Numbering
from cloudvmm.control.tree import device_tree
from cloudvmm.engine.base import Machine, PciBar


class Vm:
    """A machine and what the loop knows about it."""

    def __init__(self, machine: Machine, numbering: Numbering, vm_config: VmConfig) -> None:
        self.machine = machine
        self.numbering = numbering
        self.state = VmState.CREATED
        self.balloon_actual_bytes: int | None = None
        self.exit_reason: str | None = None
        self.tree: DeviceTree = device_tree(vm_config, numbering, {})

    def check(self, target: VmState) -> None:
        """:raises InvalidStateTransition: `target` may not follow the present state."""
        check_transition(self.state, target)

    def place_bars(self, vm_config: VmConfig, bars: dict[str, list[PciBar]]) -> None:
        self.tree = device_tree(vm_config, self.numbering, bars)


def configured_ram_bytes(vm_config: VmConfig) -> int:
    """Return the RAM at boot: `memory.size` and all zones, hotplugged amounts not counted."""
    return vm_config.memory.size + sum(zone.size for zone in vm_config.memory.zones or [])
