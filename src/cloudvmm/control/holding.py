"""What a VMM holds: nothing, a config, or a config and a VM. Owned by the control loop.

A stored config is never changed in place: a change stores a new one. So an answer that refers to it stays
true to its moment, whoever reads it and however late.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from cloudvmm.api.data import VmInfo, VmState
from cloudvmm.api.error import VmNotCreated, VmNotRunning
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.console import Consoles
from cloudvmm.control.vm import Vm, configured_ram_bytes
from cloudvmm.control.worker import Steps
from cloudvmm.engine.base import Machine

if TYPE_CHECKING:
    from cloudvmm.control.migration import Migration
    from cloudvmm.control.saving import Saving
    from cloudvmm.migration.cut import Cut

# What the guest asked for, by name, and the steps of it.
Postponed = list[tuple[str, Callable[[], Steps]]]
GUEST_RESET: Final = "guest reset"


class Lent(msgspec.Struct):
    """The VM is in the hands of an outgoing migration; `info` is what was true when it was lent.

    `postponed` is what the guest asked for meanwhile: it is done once the VM is back. Once it `is_given` the
    other VMM may have it.
    """

    info: VmInfo
    postponed: Postponed = msgspec.field(default_factory=list)
    is_given: bool = False


class Intent(msgspec.Struct, frozen=True):
    """A device that is about to be added: what the config is with it, and the slot that it goes to."""

    vm_config: VmConfig
    device_id: str
    slot: int


class Holding:
    """`on_machine` and `on_machine_gone` tell the loop which machine to watch.

    `cut` ends the migration that is under way, whichever way it goes; `migration` tells of the last one, and
    `saving` of the last snapshot. On `debugger_fd` each machine serves a debugger; lent. `write_down` keeps
    for a later VMM what is held, where there is a place for it; `promise` does so or raises a `VmmError`.
    `left` is the VM once another VMM has it: what is here of it is to go. `arrived` is what a VM that comes
    from another VMM is to be, once that has let go of it.
    """

    def __init__(
        self,
        on_machine: Callable[[Machine], None],
        on_machine_gone: Callable[[Machine], None],
        *,
        debugger_fd: int | None = None,
    ) -> None:
        self.debugger_fd = debugger_fd
        self.vm_config: VmConfig | None = None
        self.consoles: Consoles | None = None
        self.vm: Vm | None = None
        self.rebooting: Vm | None = None  # what it was, until it is again
        self.lent: Lent | None = None
        self.left: Lent | None = None
        self.cut: Cut | None = None
        self.migration: Migration | None = None
        self.saving: Saving | None = None
        self.intent: Intent | None = None
        self.arrived: VmState | None = None
        self.write_down: Callable[[], None] = lambda: None
        self.promise: Callable[[], None] = lambda: None
        self._info: VmInfo | None = None
        self._info_of: tuple[object, ...] = ()
        self._on_machine = on_machine
        self._on_machine_gone = on_machine_gone

    def take_vm(self, vm: Vm) -> None:
        self.vm = vm
        self._on_machine(vm.machine)
        self.write_down()

    def stop_watching(self) -> None:
        """What the machine says from now on is expected and of no interest."""
        if self.vm is not None:
            self._on_machine_gone(self.vm.machine)

    def created_config(self) -> VmConfig:
        """:raises VmNotCreated: there is nothing."""
        if self.vm_config is None:
            raise VmNotCreated
        return self.vm_config

    def running_vm(self) -> Vm:
        """:raises VmNotRunning: there is no VM object; in which state it is does not matter."""
        if self.vm is None:
            raise VmNotRunning
        return self.vm

    def info(self) -> VmInfo:
        """Return the same object for as long as it is true.

        :raises VmNotCreated: there is nothing.
        """
        if self.lent is not None:
            return self.lent.info
        if self.vm_config is None:
            raise VmNotCreated
        vm = self.rebooting or self.vm
        key = (self.vm_config, vm, *((vm.state, vm.tree, vm.guest_ram) if vm is not None else ()))
        if self._info is None or not _are_same(key, self._info_of):
            self._info, self._info_of = self._make_info(self.vm_config, vm), key
        return self._info

    def _make_info(self, vm_config: VmConfig, vm: Vm | None) -> VmInfo:
        ram_bytes = configured_ram_bytes(vm_config)
        if vm is None:
            return VmInfo(config=vm_config, state=VmState.CREATED, memory_actual_size=ram_bytes)
        return VmInfo(
            config=vm_config,
            state=vm.state,
            memory_actual_size=vm.guest_ram.actual_bytes(ram_bytes),
            device_tree=vm.tree,
        )


def _are_same(one: tuple[object, ...], other: tuple[object, ...]) -> bool:
    """By identity: what is held is replaced, never changed."""
    return len(one) == len(other) and all(map(operator.is_, one, other))
