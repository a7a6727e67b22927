"""Going on where the last VMM on the state folder ended, whenever and however that was.

The engine takes the machine over; here are the config, the VM object, the consoles and what becomes of the
command that was under way. Done by the control loop's thread before it takes any request: whoever asks is
answered from what was adopted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

import msgspec

from cloudvmm.api import action
from cloudvmm.api.channel import ReplyChannel
from cloudvmm.api.data import Empty, VmState
from cloudvmm.api.error import NoDeviceToRemove
from cloudvmm.config import form
from cloudvmm.config.operation import RestoreConfig, VmReceiveMigrationData, VmRemoveDeviceData
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.command import Commands
from cloudvmm.control.console import ConsoleError, Consoles, KeptPty, remove_all_pipes
from cloudvmm.control.edit import find_device, without_device
from cloudvmm.control.holding import GUEST_RESET, Holding
from cloudvmm.control.ledger import KeptLent, Ledger, UnderWay, data_of, is_there
from cloudvmm.control.numbering import VIRTIO_PCI_PREFIX
from cloudvmm.control.ram import Vcpus
from cloudvmm.control.record import decode_record
from cloudvmm.control.runner import MIGRATION, Log
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Steps
from cloudvmm.engine.base import Adopted, Engine, EngineError
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.events.hub import EventHub
from cloudvmm.host.terminal import Pty

FINISHED: Final = "finished"
ROLLED_BACK: Final = "rolled back"
UNKNOWN: Final = "unknown"
FAILED: Final = "failed"

# What can be asked for once more, whatever was done of it.
_REPEATED: Final = frozenset(
    {
        action.VmRemoveDevice.name,
        action.VmResize.name,
        action.VmResizeZone.name,
        action.VmResizeDisk.name,
        action.VmShutdown.name,
        action.VmDelete.name,
        action.VmReboot.name,
    }
)
# What was done once, or was not.
_ONCE: Final = frozenset({action.VmPowerButton.name, action.VmNmi.name})
# What makes a VM out of what another has left.
_ARRIVALS: Final = frozenset({action.VmRestore.name, action.VmReceiveMigration.name})
_ENDS: Final = frozenset({action.VmmShutdown.name, "guest power-off", "machine exit"})

# What is in the folder beside these is the engine's.
_OUR_FILES: Final = frozenset(
    {"lock", "format", "journal", "journal.old", "vm", "vm.new", "events", "events.new"}
)

OnOutcome = Callable[[str, str], None]


class Adoption:
    """`holding` is filled; `add` queues what is to be finished; `tell` writes what came of a command."""

    def __init__(
        self,
        engine: Engine,
        events: EventHub,
        holding: Holding,
        commands: Commands,
        *,
        state_dir: str,
        add: Callable[[str, Steps], None],
        tell: OnOutcome,
        log: Log,
    ) -> None:
        self._engine = engine
        self._events = events
        self._holding = holding
        self._commands = commands
        self._state_dir = state_dir
        self._add = add
        self._tell_journal = tell
        self._log = log

    def run(self, ledger: Ledger | None, unfinished: Iterable[str] = ()) -> bool:
        """Blocking. Go on with what `ledger` tells of; return whether there is a machine.

        `unfinished` is what the last VMM had begun, beside its commands, too.

        :raises VmmError: there is one that cannot be taken over; it is left as it is.
        """
        ledger = Ledger() if ledger is None else _without_refused(ledger)
        if ledger.under_way is not None:
            _sweep_way(ledger.under_way)
        # An engine that is not loaded yet need not be where there is nothing that it could have left.
        is_asked = not _OUR_FILES.issuperset(os.listdir(self._state_dir))
        adopted = self._engine.adopt(self._state_dir) if is_asked else None
        try:
            has_machine = self._go_on(ledger, adopted)
            for name in unfinished:
                if name == MIGRATION and ledger.lent is not None:
                    if not has_machine and not ledger.lent.has_left:
                        self._tell(name, UNKNOWN if ledger.lent.is_given else ROLLED_BACK)
                elif ledger.under_way is None or name != ledger.under_way.command:
                    self._tell(name, ROLLED_BACK)
            return has_machine
        except BaseException:
            self._holding.vm = None  # nobody is to end it
            raise

    def _go_on(self, ledger: Ledger, adopted: Adopted | None) -> bool:
        if is_there(ledger.vm_config):
            self._holding.vm_config = form.decode_saved(bytes(ledger.vm_config), VmConfig)
        if adopted is not None and not (is_there(ledger.vm_config) and is_there(ledger.record)):
            self._log("warn", "A VM that the last VMM was about to build has been ended")
            adopted.machine.close()
            adopted = None
        if adopted is None:
            remove_all_pipes(self._state_dir)
        if self._holding.vm_config is None:
            self._settle_without(ledger.under_way)
            return False
        if adopted is None:
            self._settle_gone(ledger)
            if ledger.lent is not None and ledger.lent.has_left:
                self._finish(MIGRATION, self._commands.delete())
            return False
        self._open_consoles(ledger.consoles, adopted.kept_fds)
        vm = self._take_vm(ledger, adopted)
        self._drop_gone(vm, adopted)
        self._commands.power.enclose_at_once()
        self._log("info", f"The VM of the last VMM goes on here: {vm.state.value}")
        self._events.emit("vmm", "adopted", {"state": vm.state.value}, is_ours=True)
        if ledger.under_way is not None:
            self._settle(ledger, ledger.under_way, adopted, vm)
        if ledger.lent is not None:
            self._settle_lent(ledger.lent, vm)
        return True

    def _take_vm(self, ledger: Ledger, adopted: Adopted) -> Vm:
        record = decode_record(ledger.record)
        stored = self._holding.created_config()
        vm = Vm(adopted.machine, record.numbering(self._engine.info), stored)
        record.give_sizes(vm)
        if adopted.vcpus != vm.vcpus.present:
            vm.vcpus = Vcpus(adopted.vcpus, is_removing=vm.vcpus.is_removing)
        for size in adopted.modules[len(vm.ram.modules) :]:
            vm.ram = vm.ram.with_module(size)
        vm.state = VmState.RUNNING if adopted.is_running else VmState.PAUSED
        vm.place_bars(adopted.machine.pci_resources())
        self._holding.take_vm(vm)
        return vm

    def _drop_gone(self, vm: Vm, adopted: Adopted) -> None:
        """Tell of devices that the machine has no more: it may have written that down, and we not yet."""
        for device_id in vm.numbering.slots.keys() - adopted.device_ids:
            bdf = vm.drop_device(device_id)
            if bdf is not None:
                self._events.emit("vm", "device-removed", {"id": device_id, "bdf": bdf})

    def _open_consoles(self, kept: dict[int, KeptPty], fds: dict[int, int]) -> None:
        """Have the users' ends that the last VMM had, as far as they are there still."""
        ptys = {
            number: Pty(fds[pty.master_fd], fds[pty.slave_fd], pty.path)
            for number, pty in kept.items()
            if pty.master_fd in fds and pty.slave_fd in fds
        }
        stored = self._holding.created_config()
        pipe_dir = self._state_dir if self._engine.outlives_manager else None
        consoles = Consoles(stored, pipe_dir=pipe_dir, ptys=ptys)
        consoles.write_paths(stored)
        self._holding.consoles = consoles

    def _settle_without(self, under_way: UnderWay | None) -> None:
        if under_way is not None:
            self._tell(under_way.command, FINISHED if under_way.command in _REPEATED else ROLLED_BACK)

    def _settle_gone(self, ledger: Ledger) -> None:
        """There is a config, and no machine that lives."""
        under_way = ledger.under_way
        if ledger.state is not None:
            self._log("error", "The VM of the last VMM is gone")
            self._events.emit("vm", "shutdown")
        elif ledger.consoles:
            try:
                self._open_consoles({}, {})
            except ConsoleError as error:
                self._log("error", f"The consoles are gone: {': '.join(error_chain(error))}")
        if under_way is None:
            return
        if under_way.command in (action.VmReboot.name, GUEST_RESET):
            self._finish(under_way.command, self._commands.power.boot())
        elif under_way.command in (action.VmDelete.name, action.VmmShutdown.name):
            self._finish(under_way.command, self._commands.delete())
        elif under_way.command in (action.VmShutdown.name, action.VmCreate.name, *_ENDS):
            self._tell(under_way.command, FINISHED)
        elif under_way.command in _ARRIVALS and ledger.arrived is None:
            self._take_back(under_way.command, self._commands.delete())
        elif under_way.command in _ARRIVALS:  # the other VMM may have let go of it, or not
            self._tell(under_way.command, UNKNOWN)
        elif ledger.state is None and under_way.command in _REPEATED:
            self._repeat(under_way)
        else:
            self._tell(under_way.command, ROLLED_BACK)

    def _settle(self, ledger: Ledger, under_way: UnderWay, adopted: Adopted, vm: Vm) -> None:
        """There is a machine: look what has become of the command, and finish it or take it back."""
        command, state = under_way.command, vm.state
        if command == GUEST_RESET:
            self._finish(command, self._commands.power.reboot())
        elif command in _ENDS:
            self._finish(command, self._commands.delete())
        elif command == action.VmRemoveDevice.name:
            self._finish_removal(under_way)
        elif command in _REPEATED:
            self._repeat(under_way)
        elif command in _ONCE:
            self._tell(command, UNKNOWN)
        elif command == action.VmPause.name:
            self._tell(command, FINISHED if state is VmState.PAUSED else ROLLED_BACK)
        elif command in _ARRIVALS:
            self._settle_arrival(ledger, under_way, state)
        elif command in (action.VmResume.name, action.VmBoot.name):
            self._tell(command, FINISHED if state is VmState.RUNNING else ROLLED_BACK)
        elif ledger.coming is not None:
            self._settle_device(ledger, command, adopted, vm)
        else:
            self._tell(command, ROLLED_BACK)
            if under_way.state is VmState.RUNNING and state is VmState.PAUSED:
                self._add("resume", self._quietly(self._commands.power.resume(), lambda _: None))

    def _settle_arrival(self, ledger: Ledger, under_way: UnderWay, state: VmState) -> None:
        """The VM is whole: it goes on here if nobody else may have it, and as it was to."""
        target = ledger.arrived
        if under_way.command == action.VmRestore.name:
            found = data_of(under_way)
            is_to_run = found is not None and isinstance(found[1], RestoreConfig) and found[1].resume
            target = VmState.RUNNING if is_to_run else VmState.PAUSED
        if target is None:  # the other VMM has not let go of it
            self._take_back(under_way.command, self._commands.delete())
        elif target is VmState.RUNNING and state is VmState.PAUSED:
            self._finish(under_way.command, self._commands.power.resume())
        else:
            self._tell(under_way.command, FINISHED)

    def _settle_lent(self, lent: KeptLent, vm: Vm) -> None:
        """The VM was on its way to another VMM, which may have it only once it was given."""
        if lent.has_left:
            self._finish(MIGRATION, self._commands.delete())
        elif vm.state is not VmState.PAUSED or lent.state is not VmState.RUNNING:
            self._tell(MIGRATION, UNKNOWN if lent.is_given else ROLLED_BACK)
        elif not lent.is_given:
            self._take_back(MIGRATION, self._resume_released(vm))
        else:
            self._log("error", "The VM stays paused: only if the other VMM has nothing of it, call vm.resume")
            self._tell(MIGRATION, UNKNOWN)

    def _resume_released(self, vm: Vm) -> Steps:
        """Resume a guest whose images the other VMM may hold yet."""
        from cloudvmm.control.send import resume_when_released

        self._events.emit("vm", "resuming")
        yield from resume_when_released(vm.machine)
        vm.state = VmState.RUNNING
        self._events.emit("vm", "resumed")
        return Empty()

    def _settle_device(self, ledger: Ledger, command: str, adopted: Adopted, vm: Vm) -> None:
        coming = ledger.coming
        assert coming is not None
        if coming.device_id not in adopted.device_ids:
            self._tell(command, ROLLED_BACK)
            return
        if coming.device_id not in vm.numbering.slots:
            changed = form.decode_saved(bytes(coming.vm_config), VmConfig)
            vm.numbering.take(find_device(changed, coming.device_id), coming.device_id, coming.slot)
            vm.renew_tree()
            self._holding.vm_config = changed
        self._tell(command, FINISHED)

    def _finish_removal(self, under_way: UnderWay) -> None:
        found = data_of(under_way)
        if found is None or not isinstance(found[1], VmRemoveDeviceData):
            self._tell(under_way.command, UNKNOWN)
        else:
            self._finish(under_way.command, self._remove(found[1]))

    def _remove(self, data: VmRemoveDeviceData) -> Steps:
        """Remove a device that the guest may have let go of, or does now; the config may not know of it."""
        vm = self._holding.running_vm()
        try:
            if data.id in vm.tree:
                return (yield from self._commands.steps(action.VmRemoveDevice(data, ReplyChannel())))
        except VmmError:
            if data.id in vm.tree:
                raise
        stored, device_id = self._holding.created_config(), data.id.removeprefix(VIRTIO_PCI_PREFIX)
        with contextlib.suppress(NoDeviceToRemove):
            self._holding.vm_config, _ = without_device(stored, device_id)
        return Empty()

    def _repeat(self, under_way: UnderWay) -> None:
        found = data_of(under_way)
        if found is None:
            self._tell(under_way.command, UNKNOWN)
            return
        kind, data = found
        self._finish(under_way.command, self._commands.steps(kind(data, ReplyChannel())))

    def _finish(self, command: str, steps: Steps) -> None:
        self._add(command, self._quietly(steps, partial(self._tell, command)))

    def _take_back(self, command: str, steps: Steps) -> None:
        """Leave nothing of what `command` has done, by these `steps`."""

        def tell(outcome: str) -> None:
            self._tell(command, ROLLED_BACK if outcome == FINISHED else outcome)

        self._add(command, self._quietly(steps, tell))

    def _quietly(self, steps: Steps, tell: Callable[[str], None]) -> Steps:
        """The `steps`, whose failure is told of, and ends nothing else."""
        try:
            yield from steps
        except (VmmError, EngineError) as error:
            self._log("error", f"It could not be finished: {': '.join(error_chain(error))}")
            tell(FAILED)
        else:
            tell(FINISHED)
        return Empty()

    def _tell(self, command: str, outcome: str) -> None:
        self._log("warn", f"{command} was under way when the last VMM ended: {outcome}")
        self._tell_journal(command, outcome)
        self._events.emit("vmm", "settled", {"command": command, "outcome": outcome}, is_ours=True)


def _without_refused(ledger: Ledger) -> Ledger:
    """Return `ledger` without a command that has done nothing yet, and was not to do anything but wait."""
    under_way, lent = ledger.under_way, ledger.lent
    if under_way is None:
        return ledger
    is_lent = lent is not None and not lent.has_left  # of such a VM nothing is done
    has_vm = under_way.state is not None or (
        under_way.has_config and under_way.command == action.VmRestore.name
    )
    if is_lent or (has_vm and under_way.command in _ARRIVALS):
        return msgspec.structs.replace(ledger, under_way=None)
    return ledger


def _sweep_way(under_way: UnderWay) -> None:
    """Remove the socket at which the last VMM waited for a VM, if that was what it did."""
    if under_way.command != action.VmReceiveMigration.name:
        return
    found = data_of(under_way)
    if found is None or not isinstance(found[1], VmReceiveMigrationData):
        return
    from cloudvmm.host.dead_socket import remove_dead
    from cloudvmm.migration.address import AddressError, UnixAddress, parse_address

    with contextlib.suppress(AddressError):  # it was about to be refused
        address = parse_address(found[1].receiver_url)
        if isinstance(address, UnixAddress):
            remove_dead(address.path)
