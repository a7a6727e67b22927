"""What each command does, as steps.

A command is a generator. What it does itself it does on the control loop, which owns all state; each `yield`
hands a job (a callable that may block) to the worker and gives back what the job returned, or raises what it
raised. State is committed between the steps, never inside a job. What a command returns is its answer; what
it raises becomes the cause of the command's own error. A command without any job is a plain method.

Reference: lifecycle.md section 3, rest.md section 8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from cloudvmm.api import action
from cloudvmm.api import error as api_error
from cloudvmm.api.data import ApiResponsePayload, Empty, VmActionPayload, VmState
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.control import edit
from cloudvmm.control.blueprint import Built, build_vm, final_step_error
from cloudvmm.control.console import ConsoleError, Consoles, open_consoles
from cloudvmm.control.coredump import dump_guest
from cloudvmm.control.descriptor import close_descriptors, descriptors_of
from cloudvmm.control.holding import Holding
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Cleanup, Steps
from cloudvmm.engine.base import Engine, EngineError, MachineGone
from cloudvmm.errors import VmmError
from cloudvmm.events.hub import EventHub

DONE = Empty()


class Commands:
    """The steps of every command that changes something; `holding` is the state they work on."""

    def __init__(
        self, engine: Engine, events: EventHub, holding: Holding, *, state_dir: str | None = None
    ) -> None:
        self._engine = engine
        self._state_dir = state_dir
        self._events = events
        self._holding = holding
        self._stepwise: dict[type[action.ApiRequest], Callable[[Any], Steps]] = {
            action.VmCreate: self.create,
            action.VmBoot: lambda _: self.boot(),
            action.VmDelete: lambda _: self.delete(),
            action.VmPause: lambda _: self.pause(),
            action.VmResume: lambda _: self.resume(),
            action.VmShutdown: lambda _: self.shutdown(),
            action.VmReboot: lambda _: self.reboot(),
            action.VmPowerButton: lambda _: self.power_button(),
            action.VmNmi: lambda _: self.nmi(),
            action.VmCoredump: lambda data: self.coredump(data.destination_url),
            action.VmRemoveDevice: lambda data: self.remove_device(data.id),
            action.VmResize: lambda data: self.edit_cold(edit.with_sizes, data),
            action.VmResizeZone: lambda data: self.edit_cold(edit.with_zone_size, data),
        }
        self._at_once: dict[type[action.ApiRequest], Callable[[Any], ApiResponsePayload]] = {
            action.VmResizeDisk: lambda _: self.resize_disk(),
            action.VmSnapshot: lambda _: self.snapshot(),
            action.VmSendMigration: lambda _: self.needs_vm_and_means(),
            action.VmRestore: lambda _: self.needs_nothing_and_means(),
            action.VmReceiveMigration: lambda _: self.needs_no_vm_and_means(),
        }
        for command in action.COMMANDS:
            if command.body is not None and issubclass(command.body, PciDevice):
                self._stepwise[command] = self.add_device

    def steps(self, request: action.ApiRequest) -> Steps:
        """Return the steps of `request`, not yet begun."""
        stepwise = self._stepwise.get(type(request))
        if stepwise is not None:
            return stepwise(request.data)
        return _no_steps(partial(self._at_once[type(request)], request.data))

    def create(self, vm_config: VmConfig) -> Steps:
        if self._holding.vm_config is not None:
            raise api_error.VmAlreadyCreated
        # The reference keeps the config even where the steps below fail; vm.delete removes it.
        self._holding.vm_config = yield partial(copy.deepcopy, vm_config)
        yield from self._open_consoles()
        if vm_config.landlock_enable:
            raise api_error.ApplyLandlock from api_error.NotImplementedYet(
                "Landlock confinement comes with a later release; start without landlock_enable"
            )
        return DONE

    def boot(self) -> Steps:
        if self._holding.vm is not None:
            raise api_error.VmAlreadyCreated
        self._events.emit("vm", "booting")
        yield from self._build_and_start()
        self._events.emit("vm", "booted")
        return DONE

    def pause(self) -> Steps:
        vm = self._running_vm()
        self._events.emit("vm", "pausing")
        try:
            yield from self._stop_vcpus(vm)
        except api_error.MigratableError as error:
            raise api_error.VmPauseFailed from error
        self._events.emit("vm", "paused")
        return DONE

    def resume(self) -> Steps:
        vm = self._running_vm()
        self._events.emit("vm", "resuming")
        try:
            yield from self._start_vcpus(vm)
        except api_error.MigratableError as error:
            raise api_error.VmResumeFailed from error
        self._events.emit("vm", "resumed")
        return DONE

    def shutdown(self) -> Steps:
        vm = self._running_vm()
        vm.check(VmState.SHUTDOWN)
        try:
            yield from self._drop_vm(vm)
        finally:
            yield from self._close_consoles()
        self._events.emit("vm", "shutdown")
        return DONE

    def delete(self) -> Steps:
        if self._holding.vm_config is None:
            return DONE
        if self._holding.vm is not None:
            yield from self.shutdown()
        yield from self._close_consoles()
        close_descriptors(descriptors_of(self._holding.vm_config))
        self._holding.vm_config = None
        self._events.emit("vm", "deleted")
        return DONE

    def reboot(self) -> Steps:
        self._events.emit("vm", "rebooting")
        vm = self._holding.vm
        if vm is None:
            raise api_error.VmNotCreated
        yield from self._drop_vm(vm)
        try:
            yield from self._build_and_start()
        except Exception:
            if self._holding.vm is not None:
                yield from self._drop_vm(self._holding.vm)
            raise
        self._events.emit("vm", "rebooted")
        return DONE

    def power_button(self) -> Steps:
        vm = self._running_vm()
        try:
            yield vm.machine.power_button
        except EngineError as error:
            raise api_error.PowerButton from error
        return DONE

    def nmi(self) -> Steps:
        vm = self._running_vm()
        try:
            yield vm.machine.nmi
        except EngineError as error:
            raise api_error.ErrorNmi from error
        return DONE

    def coredump(self, destination_url: str) -> Steps:
        vm = self._running_vm()
        self._events.emit("vm", "coredumping")
        try:
            yield from dump_guest(vm, destination_url, pause=self.pause, resume=self.resume)
        except VmmError as error:
            raise api_error.Coredump from error
        return DONE

    def vmm_shutdown(self) -> Steps:
        yield from self.delete()
        self._events.emit("vmm", "shutdown")
        return DONE

    def add_device(self, device: PciDevice) -> Steps:
        # A rule that is broken wins over means that are missing.
        changed: VmConfig = yield partial(edit.with_device, self._created_config(), device)
        if self._holding.vm is not None:
            raise api_error.DeviceManager from api_error.NotImplementedYet(
                "Adding a device to a booted VM comes with a later release; add it before vm.boot"
            )
        self._holding.vm_config = changed
        return VmActionPayload()

    def remove_device(self, device_id: str) -> Steps:
        vm_config = self._created_config()
        if self._holding.vm is not None:
            if device_id not in self._holding.vm.tree:
                raise api_error.DeviceManager from api_error.UnknownDeviceId(device_id)
            raise api_error.DeviceManager from api_error.NotImplementedYet(
                "Removing a device from a booted VM comes with a later release; remove it before vm.boot"
            )
        changed, removed = yield partial(edit.without_device, vm_config, device_id)
        self._holding.vm_config = changed
        close_descriptors(descriptors_of(removed))
        return DONE

    def edit_cold(self, change: Callable[[VmConfig, Any], VmConfig], data: Any) -> Steps:
        vm_config = self._created_config()
        if self._holding.vm is not None:
            raise api_error.NotImplementedYet(
                "Resizing a booted VM comes with a later release; resize it before vm.boot"
            )
        self._holding.vm_config = yield partial(change, vm_config, data)
        return DONE

    def resize_disk(self) -> ApiResponsePayload:
        self._created_config()
        if self._holding.vm is None:
            raise api_error.ResizeDisk
        raise api_error.ResizeDisk from api_error.NotImplementedYet()

    def snapshot(self) -> ApiResponsePayload:
        if self._running_vm().state is not VmState.PAUSED:
            raise api_error.VmSnapshotFailed from _snapshot_of_running()
        raise api_error.NotImplementedYet

    def needs_vm_and_means(self) -> ApiResponsePayload:
        self._running_vm()
        raise api_error.NotImplementedYet

    def needs_nothing_and_means(self) -> ApiResponsePayload:
        if self._holding.vm_config is not None:
            raise api_error.VmAlreadyCreated
        raise api_error.NotImplementedYet

    def needs_no_vm_and_means(self) -> ApiResponsePayload:
        if self._holding.vm is not None:
            raise api_error.VmAlreadyCreated
        raise api_error.NotImplementedYet

    def _created_config(self) -> VmConfig:
        if self._holding.vm_config is None:
            raise api_error.VmNotCreated
        return self._holding.vm_config

    def _running_vm(self) -> Vm:
        if self._holding.vm is None:
            raise api_error.VmNotRunning
        return self._holding.vm

    def _open_consoles(self) -> Steps:
        """Open what the config asks for, and write the paths of new PTYs into it."""
        stored = self._created_config()
        try:
            consoles: Consoles = yield partial(open_consoles, stored)
        except ConsoleError as error:
            raise api_error.CreateConsoleDevices from error
        self._holding.consoles = consoles
        if consoles.has_pty:
            vm_config: VmConfig = yield partial(copy.deepcopy, stored)
            consoles.write_paths(vm_config)
            self._holding.vm_config = vm_config
        return DONE

    def _renew_consoles(self) -> Steps:
        """Make the consoles ready for a new machine; those that a shutdown closed are opened again."""
        if self._holding.consoles is None:
            yield from self._open_consoles()
        else:
            yield self._holding.consoles.renew_streams
        return DONE

    def _close_consoles(self) -> Steps:
        consoles, self._holding.consoles = self._holding.consoles, None
        if consoles is not None:
            yield Cleanup(consoles.close)
        return DONE

    def _build_and_start(self) -> Steps:
        """From a config to a running VM. A failure of the last step leaves a VM object in Created."""
        if self._holding.vm_config is None:
            raise api_error.VmMissingConfig
        yield from self._renew_consoles()
        stored, consoles = self._holding.vm_config, self._holding.consoles
        assert consoles is not None
        built: Built = yield partial(build_vm, self._engine, stored, consoles, self._state_dir)
        self._holding.vm_config = built.vm_config
        vm = Vm(built.machine, built.numbering, built.vm_config)
        self._holding.take_vm(vm)
        try:
            yield vm.machine.boot
        except EngineError as error:
            raise final_step_error(error) from error
        if vm.exit_reason is not None:
            raise api_error.DeviceManager from MachineGone(vm.exit_reason)
        vm.state = VmState.RUNNING
        return DONE

    def _stop_vcpus(self, vm: Vm) -> Steps:
        try:
            vm.check(VmState.PAUSED)
            yield vm.machine.pause
        except api_error.InvalidStateTransition as error:
            raise api_error.MigratablePause from api_error.InvalidTransition(error.before, error.after)
        except EngineError as error:
            raise api_error.MigratablePause from error
        vm.state = VmState.PAUSED
        return DONE

    def _start_vcpus(self, vm: Vm) -> Steps:
        try:
            vm.check(VmState.RUNNING)
            yield vm.machine.resume
        except api_error.InvalidStateTransition as error:
            raise api_error.MigratableResume from api_error.InvalidTransition(error.before, error.after)
        except EngineError as error:
            raise api_error.MigratableResume from error
        vm.state = VmState.RUNNING
        return DONE

    def _drop_vm(self, vm: Vm) -> Steps:
        """End the machine; the VM object is gone afterwards even where that failed."""
        self._holding.stop_watching()
        try:
            yield Cleanup(vm.machine.close)
        except EngineError as error:
            vm.machine.kill()
            raise api_error.VmShutdownFailed from error
        finally:
            self._holding.vm = None
        return DONE


def _snapshot_of_running() -> api_error.MigratableSnapshot:
    error = api_error.MigratableSnapshot()
    error.__cause__ = api_error.MigratableError("Trying to snapshot while VM is running")
    return error


def _no_steps(call: Callable[[], ApiResponsePayload]) -> Steps:
    yield from ()
    return call()
