"""What each command does, as steps.

A command is a generator. What it does itself it does on the control loop, which owns all state; each `yield`
hands a job (a callable that may block) to the worker and gives back what the job returned, or raises what it
raised. State is committed between the steps, never inside a job. What a command returns is its answer; what
it raises becomes the cause of the command's own error. A command without any job is a plain method.

Here is which command is which steps, and what becomes of the config as a whole. The way between the VM's
states is in `power.py`; devices, sizes, and the ways out of this VMM and into it are behind `latecomer.py`.

Reference: lifecycle.md section 3, rest.md section 8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cloudvmm.api import action
from cloudvmm.api import error as api_error
from cloudvmm.api.data import Empty, VmState
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.descriptor import close_descriptors, descriptors_of
from cloudvmm.control.enclosure import Enclosure
from cloudvmm.control.holding import Holding
from cloudvmm.control.lane import Lane
from cloudvmm.control.latecomer import Latecomers
from cloudvmm.control.lent import unless_lent
from cloudvmm.control.power import Power
from cloudvmm.control.sibling import Siblings
from cloudvmm.control.worker import Steps
from cloudvmm.engine.base import Engine
from cloudvmm.errors import VmmError
from cloudvmm.events.hub import EventHub

DONE = Empty()


class DescriptorsNotKept(VmmError):
    """A VM that outlives its manager cannot stand on descriptors that a client hands over"""


def _refuse(error: VmmError) -> Steps:
    yield partial(_raise, error)
    return DONE


def _raise(error: VmmError) -> None:
    raise error


class Commands:
    """The steps of every command that changes something; `holding` is the state they work on."""

    def __init__(
        self,
        engine: Engine,
        events: EventHub,
        holding: Holding,
        *,
        lane: Lane,
        log: Callable[[str, str], None],
        renew_workers: Callable[[], None],
        state_dir: str | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self._events = events
        self._holding = holding
        self._outlives_us = state_dir is not None and engine.outlives_manager
        warn = partial(log, "warn")
        enclosure = Enclosure(engine, renew_workers, state_dir=state_dir)
        self.power = power = Power(
            engine, events, holding, enclosure=enclosure, state_dir=state_dir, warn=warn
        )
        late = Latecomers(
            engine,
            events,
            holding,
            power,
            lane=lane,
            delete=self.delete,
            log=log,
            state_dir=state_dir,
            siblings=siblings,
        )
        self._stepwise: dict[type[action.ApiRequest], Callable[[Any], Steps]] = {
            action.VmCreate: self.create,
            action.VmBoot: lambda _: power.boot(),
            action.VmDelete: lambda _: self.delete(),
            action.VmPause: lambda _: power.pause(),
            action.VmResume: lambda _: power.resume(),
            action.VmShutdown: lambda _: power.shutdown(),
            action.VmReboot: lambda _: power.reboot(),
            action.VmPowerButton: lambda _: power.power_button(),
            action.VmNmi: lambda _: power.nmi(),
            action.VmCoredump: lambda data: power.coredump(data.destination_url),
            **late.steps(),
        }

    def steps(self, request: action.ApiRequest) -> Steps:
        """Return the steps of `request`, not yet begun."""
        if self._outlives_us and descriptors_of(request.data):
            return _refuse(DescriptorsNotKept())
        steps = self._stepwise[type(request)](request.data)
        return unless_lent(self._holding, self._events, request, steps)

    def create(self, vm_config: VmConfig) -> Steps:
        if self._holding.vm_config is not None:
            raise api_error.VmAlreadyCreated
        # The reference keeps the config even where the steps below fail; vm.delete removes it.
        self._holding.vm_config = vm_config
        yield from self.power.open_consoles()
        yield from self.power.enclose()
        return DONE

    def delete(self) -> Steps:
        if self._holding.vm_config is None:
            return DONE
        if self._holding.vm is not None:
            yield from self.power.shutdown()
        yield from self.power.close_consoles()
        close_descriptors(descriptors_of(self._holding.vm_config))
        self._holding.vm_config = None
        self._events.emit("vm", "deleted")
        return DONE

    def vmm_shutdown(self) -> Steps:
        vm = self._holding.vm
        if vm is not None and vm.state is VmState.BREAK_POINT:  # from which there is no way to Shutdown
            yield from self.power.drop_vm(vm)
        yield from self.delete()
        self._events.emit("vmm", "shutdown")
        return DONE
