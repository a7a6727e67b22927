"""A VM's way between its states: boot, pause, resume, shutdown, reboot; and what wakes or looks at its guest.

The steps of `command.py` that make, run and end the machine, and the consoles that go with it.
Reference: lifecycle.md section 3.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty, VmState
from cloudvmm.config.vm import VmConfig
from cloudvmm.config.warning import Warn
from cloudvmm.control.blueprint import Built, build_vm, final_step_error
from cloudvmm.control.console import ConsoleError, Consoles, has_no_console, open_consoles
from cloudvmm.control.enclosure import Enclosure
from cloudvmm.control.holding import Holding
from cloudvmm.control.vm import Vm
from cloudvmm.control.worker import Cleanup, Job, Steps
from cloudvmm.engine.base import Engine, EngineError, MachineGone
from cloudvmm.errors import VmmError
from cloudvmm.events.hub import EventHub

DumpGuest = Callable[..., Generator[Job, Any, None]]

DONE = Empty()


class Power:
    """`holding` is the state that the steps work on."""

    def __init__(
        self,
        engine: Engine,
        events: EventHub,
        holding: Holding,
        *,
        enclosure: Enclosure,
        warn: Warn,
        state_dir: str | None = None,
    ) -> None:
        self._warn = warn
        self._enclosure = enclosure
        self._engine = engine
        self._events = events
        self._holding = holding
        self._state_dir = state_dir
        self._pipe_dir = state_dir if state_dir is not None and engine.outlives_manager else None

    def boot(self) -> Steps:
        if self._holding.vm is not None:
            raise api_error.VmAlreadyCreated
        self._events.emit("vm", "booting")
        yield from self._build_and_start()
        self._events.emit("vm", "booted")
        return DONE

    def pause(self) -> Steps:
        vm = self._holding.running_vm()
        self._events.emit("vm", "pausing")
        try:
            yield from self._stop_vcpus(vm)
        except api_error.MigratableError as error:
            raise api_error.VmPauseFailed from error
        self._events.emit("vm", "paused")
        return DONE

    def resume(self) -> Steps:
        vm = self._holding.running_vm()
        self._events.emit("vm", "resuming")
        try:
            yield from self._start_vcpus(vm)
        except api_error.MigratableError as error:
            raise api_error.VmResumeFailed from error
        self._events.emit("vm", "resumed")
        return DONE

    def shutdown(self) -> Steps:
        vm = self._holding.running_vm()
        vm.check(VmState.SHUTDOWN)
        try:
            yield from self.drop_vm(vm)
        finally:
            yield from self.close_consoles()
        self._events.emit("vm", "shutdown")
        return DONE

    def reboot(self) -> Steps:
        self._events.emit("vm", "rebooting")
        vm = self._holding.vm
        if vm is None:
            raise api_error.VmNotCreated
        self._holding.rebooting = vm
        try:
            yield from self.drop_vm(vm)
            yield from self._build_and_start()
        except Exception:
            if self._holding.vm is not None:
                yield from self.drop_vm(self._holding.vm)
            raise
        finally:
            self._holding.rebooting = None
        self._events.emit("vm", "rebooted")
        return DONE

    def pause_lent(self, vm: Vm) -> Steps:
        """Pause a VM that is lent, for whom it is lent to."""
        self._events.emit("vm", "pausing")
        yield from self._stop_vcpus(vm)
        self._events.emit("vm", "paused")
        return DONE

    def power_button(self) -> Steps:
        vm = self._holding.running_vm()
        try:
            yield vm.machine.power_button
        except EngineError as error:
            raise api_error.PowerButton from error
        return DONE

    def nmi(self) -> Steps:
        vm = self._holding.running_vm()
        try:
            yield vm.machine.nmi
        except EngineError as error:
            raise api_error.ErrorNmi from error
        return DONE

    def coredump(self, destination_url: str) -> Steps:
        vm = self._holding.running_vm()
        self._events.emit("vm", "coredumping")
        dump_guest: DumpGuest = yield _load_dump_guest
        try:
            yield from dump_guest(vm, destination_url, pause=self.pause, resume=self.resume)
        except VmmError as error:
            raise api_error.Coredump from error
        return DONE

    def open_consoles(self, *, is_continued: bool = False) -> Steps:
        """Open what the config asks for, and write the paths of new PTYs into it.

        With `is_continued` another VMM on this host has them open, until `settle_consoles`.
        """
        stored = self._holding.created_config()
        try:
            open_all = partial(open_consoles, stored, is_continued=is_continued, pipe_dir=self._pipe_dir)
            # Another thread is asked only for what may take time.
            consoles: Consoles = open_all() if has_no_console(stored) else (yield open_all)
        except ConsoleError as error:
            raise api_error.CreateConsoleDevices from error
        self._holding.consoles = consoles
        if consoles.has_pty:
            vm_config: VmConfig = yield partial(copy.deepcopy, stored)
            consoles.write_paths(vm_config)
            self._holding.vm_config = vm_config
        return DONE

    def enclose(self, *, readable: Sequence[str] = ()) -> Steps:
        """As `Enclosure.close_around`, around the stored config."""
        return (yield from self._enclosure.close_around(self._holding.created_config(), readable=readable))

    def enclose_at_once(self) -> None:
        """As `Enclosure.close_at_once`, around the stored config."""
        self._enclosure.close_at_once(self._holding.created_config())

    def settle_consoles(self) -> Steps:
        """The other VMM has no use for its consoles any more: be where they are."""
        if self._holding.consoles is not None:
            try:
                yield Cleanup(self._holding.consoles.take_places)
            except OSError as error:
                self._warn(f"The socket of a console is not where it was: {error}")
        return DONE

    def renew_consoles(self) -> Steps:
        """Make the consoles ready for a new machine; those that a shutdown closed are opened again."""
        if self._holding.consoles is None:
            yield from self.open_consoles()
        else:
            yield self._holding.consoles.renew_streams
        return DONE

    def close_consoles(self) -> Steps:
        consoles, self._holding.consoles = self._holding.consoles, None
        if consoles is None:
            return DONE
        if consoles.has_thread:
            yield Cleanup(consoles.close)
        else:
            consoles.close()
        return DONE

    def _build_and_start(self) -> Steps:
        """From a config to a running VM. A failure of the last step leaves a VM object in Created."""
        if self._holding.vm_config is None:
            raise api_error.VmMissingConfig
        yield from self.renew_consoles()
        if not self._enclosure.is_closed:  # it failed when the config came
            yield from self.enclose()
        stored, consoles = self._holding.vm_config, self._holding.consoles
        assert consoles is not None
        built: Built = yield partial(
            build_vm,
            self._engine,
            stored,
            consoles,
            self._state_dir,
            debugger_fd=self._holding.debugger_fd,
            warn=self._warn,
        )
        self._holding.vm_config = built.vm_config
        vm = Vm(built.machine, built.numbering, built.vm_config)
        self._holding.take_vm(vm)
        try:
            self._holding.promise()  # a VMM after this one ends a machine that it cannot tell a VM of
        except VmmError:
            yield from self.drop_vm(vm)
            raise
        try:
            yield vm.machine.boot
        except EngineError as error:
            refusal: VmmError = yield partial(final_step_error, error, built.vm_config.payload)
            raise refusal from refusal.__cause__
        if vm.exit_reason is not None:
            raise api_error.DeviceManager from MachineGone(vm.exit_reason)
        is_held = built.vm_config.gdb if vm.is_held is None else vm.is_held
        vm.state = VmState.BREAK_POINT if is_held else VmState.RUNNING
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

    def drop_vm(self, vm: Vm) -> Steps:
        """End the machine; the VM object is gone afterwards even where that failed."""
        self._holding.stop_watching()
        vm.is_ending = True
        try:
            yield Cleanup(vm.machine.close)
        except EngineError as error:
            vm.machine.kill()
            with contextlib.suppress(EngineError):
                yield Cleanup(vm.machine.close)  # what stood in its way may have gone with the guest
            raise api_error.VmShutdownFailed from error
        finally:
            self._holding.vm = None
        return DONE


def _load_dump_guest() -> DumpGuest:
    """Blocking; few VMMs are ever asked for a dump."""
    from cloudvmm.control.coredump import dump_guest

    return dump_guest
